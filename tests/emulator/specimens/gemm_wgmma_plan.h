// What the clustered GEMM of gemm_wgmma.h computes, how its shared memory is laid out, and the
// order of its jobs.
#pragma once
#include <cuda.h>

#include <cstdint>

#include "ptx/wgmma.h"

namespace specimens {

namespace ptx = lora_ext::ptx;

// Y [m, n] = X [m, k] · W + S · B + bias,   S [m, r] = scale · X · Aᵀ,   amax = max |S| in fp32
//
// W and B are [n, k] and [n, r] (K-major) or [k, n] and [r, n] (MN-major); A is [r, k]. Matrices
// are fp16 or bf16, bias fp32.
struct GemmWgmmaParams {
  int m, n, k;
  float scale;
  const float* bias;  // [n], written by prepare_bias, the grid before
  void* s;            // [m, kRank] of the GEMM's type
  uint32_t*
      s_ready;  // [2 * row pairs], consumer warpgroups that have published their part of an S block
  uint32_t* ticket;     // [1], the next job
  uint32_t* finished;   // [1], clusters that are done
  float* cluster_amax;  // [clusters]
  float* amax;          // [1]
};
// s_ready, ticket and finished are zero at launch; the last cluster sets them back to zero.

// Boxes are 64 elements = 128 bytes wide, under the 128-byte swizzle.
struct GemmWgmmaMaps {
  CUtensorMap x;  // boxes of 128 rows
  CUtensorMap w;  // boxes of 64 rows
  CUtensorMap a;  // boxes of kRank rows
  CUtensorMap s;  // boxes of 128 rows
  CUtensorMap b;  // boxes of 64 rows
  CUtensorMap y;  // boxes of 64 rows
};

constexpr int kClusterSize = 2;
constexpr int kConsumers = 2;  // warpgroups, 64 rows of the tile each
constexpr int kWarpgroup = 128;
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kBlockM = 128, kBlockN = 128, kBlockK = 64;
constexpr int kRank = 32;
constexpr int kStages = 4;
constexpr int kTickets = 2;  // jobs that the scheduler may be ahead

// The registers that one thread has at launch are 65536 / 384, rounded down to a multiple of 8:
// 168. The producer gives away what it does not need: 128 * 40 + 256 * 232 = 64512 of 65536
// registers.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

// Offsets into shared memory. Swizzled tiles start at multiples of 1024 bytes.
struct SharedPlan {
  static constexpr uint32_t kRowBytes = 128;                // 64 elements of 16 bits
  static constexpr uint32_t kXBytes = kBlockM * kRowBytes;  // X or S
  static constexpr uint32_t kWBytes =
      kBlockN * kRowBytes;  // W or B; in jobs for S the first kABytes hold A
  static constexpr uint32_t kABytes = kRank * kRowBytes;
  static constexpr uint32_t kHalfBytes =
      kWBytes / kClusterSize;                             // each block loads half of W for both
  static constexpr uint32_t kSlabBytes = 64 * kRowBytes;  // 64 x 64 elements of Y
  static constexpr uint32_t kSlabs = 2;  // per consumer, so that one is stored while one is filled

  static constexpr uint32_t kX = 0;
  static constexpr uint32_t kW = kX + kStages * kXBytes;
  static constexpr uint32_t kStaging = kW + kStages * kWBytes;
  static constexpr uint32_t kFull =
      kStaging + kConsumers * kSlabs * kSlabBytes;  // mbarriers, 8 bytes each
  static constexpr uint32_t kEmpty = kFull + 8 * kStages;
  static constexpr uint32_t kTicketFull = kEmpty + 8 * kStages;
  static constexpr uint32_t kTicketEmpty = kTicketFull + 8 * kTickets;
  static constexpr uint32_t kTicket = kTicketEmpty + 8 * kTickets;  // uint32
  static constexpr uint32_t kAmax = kTicket + 4 * kTickets;         // float per consumer warp
  static constexpr uint32_t kBytes = kAmax + 4 * kConsumers * 4;
};
static_assert(SharedPlan::kBytes <= 227 * 1024);

// A position in a ring of kSize slots, each guarded by a full and an empty mbarrier. `parity` is
// that of the phase to wait for on the full barrier; a slot is empty at first, so the empty barrier
// is one phase behind.
template <int kSize>
struct Ring {
  int slot = 0;
  uint32_t parity = 0;
  __host__ __device__ void advance() {
    if (++slot == kSize) slot = 0, parity ^= 1;
  }
};

// Jobs are numbered; clusters draw them in order. First the blocks of S, for which nothing is
// awaited, then the tiles of Y: so whatever a tile waits for has been drawn already by a cluster
// that is running, even if only one fits the machine. A job is for two row blocks, one per block of
// the cluster.
struct Jobs {
  int row_pairs, column_blocks;
  __host__ __device__ Jobs(int m, int n)
      : row_pairs((m + kClusterSize * kBlockM - 1) / (kClusterSize * kBlockM)),
        column_blocks((n + kBlockN - 1) / kBlockN) {}
  __host__ __device__ int total() const { return row_pairs + row_pairs * column_blocks; }
};

}  // namespace specimens
