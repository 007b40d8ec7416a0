// oneDNN's microkernel C (+)= A B, batch-reduce GEMM, as libtorch_cpu exports it
// (ATen/native/CPUBlas.h), and the processors on which a layer's product is made of it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "common/dtype.h"
#include "cpu/fused_gemm.h"

namespace lora_ext::cpu {

// What the rules ask of a processor; the last two: of the library's microkernels there, and with AMX
// of our tiles.
struct Processor {
  bool is_intel, has_amx, has_float16, has_dot_bfloat16;
  bool float_products, bfloat16_products;
};

// Whether a product of x may go by panels of this dtype, fast or not.
bool is_offered(const Processor& processor, Dtype panel, Dtype x);
// The panels that are taken without a measurement, or nullopt: torch's product.
std::optional<Dtype> faster_panels(const Processor& processor, Dtype x);

// The dtype of A and B with which x of this dtype is multiplied, or nullopt: by torch's linear.
// float: A is converted, too. The answer depends on the processor, on what the library offers there
// (tried once), on torch.backends.mkldnn and on set_panels.
std::optional<Dtype> panel_dtype(Dtype x);
// The same for rows whose bits must not depend on their number: also where torch's linear is faster.
// Products of any number of rows are compared once.
std::optional<Dtype> batch_invariant_panel_dtype(Dtype x);

// `is_offered` on this processor, with torch.backends.mkldnn on and an instruction set in use.
bool has_panels_of(Dtype panel, Dtype x);
// Whether set_panels asked for nothing else.
bool panels_are_auto();

// "auto", "none", or "float32" or "bfloat16" wherever the library has them; false: another name.
bool set_panels(const std::string& name);

// C (+)= A times a panel of float or bfloat16: m rows of A, at a pitch of a_pitch elements; C is
// float [m, 64]; `add`: to what it has.
void multiply_panel(Dtype dtype, int64_t m, int64_t k, const void* a, int64_t a_pitch,
                    const void* panel, bool add, float* c);
// While a thread multiplies: at its end AMX's tiles are given back.
class PanelProducts {
 public:
  explicit PanelProducts(Dtype dtype) : dtype_(dtype) {}
  PanelProducts(const PanelProducts&) = delete;
  PanelProducts& operator=(const PanelProducts&) = delete;
  ~PanelProducts();

 private:
  Dtype dtype_;
};

}  // namespace lora_ext::cpu
