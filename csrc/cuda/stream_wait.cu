#include <cuda_runtime.h>

#include <chrono>
#include <thread>

#include "cuda/device.h"
#include "cuda/error.h"

namespace lora_ext::cuda {
namespace {

// A query would invalidate a capture that another thread has begun in the global mode, which is
// torch's default, although it has nothing to do with this stream.
class BesideCaptures {
 public:
  BesideCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~BesideCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  BesideCaptures(const BesideCaptures&) = delete;
  BesideCaptures& operator=(const BesideCaptures&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // then the previous mode
};

}  // namespace

// Polls, since a wait in the driver cannot be aborted.
std::optional<std::string> wait(void* stream, double seconds) {
  using Clock = std::chrono::steady_clock;
  const BesideCaptures beside;
  cudaEvent_t done = nullptr;
  cudaError_t error = cudaEventCreateWithFlags(&done, cudaEventDisableTiming);
  if (error != cudaSuccess) return text_of(error);
  error = cudaEventRecord(done, static_cast<cudaStream_t>(stream));
  const Clock::time_point start = Clock::now();
  bool ended = true;
  while (error == cudaSuccess) {
    error = cudaEventQuery(done);
    if (error != cudaErrorNotReady) break;
    cudaGetLastError();  // clears "not ready", which is no error
    error = cudaSuccess;
    if (std::chrono::duration<double>(Clock::now() - start).count() > seconds) {
      ended = false;
      break;
    }
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
  const std::string text = text_of(error);
  cudaEventDestroy(done);
  if (!ended) return std::nullopt;
  return text;
}

}  // namespace lora_ext::cuda
