// setmaxnreg: moving registers between warpgroups of a block.
#pragma once
#include <cstdint>

namespace emulator {

struct Warp;
struct Block;

void setmaxnreg_dec(uint32_t registers);
void setmaxnreg_inc(uint32_t registers);

/// Registers of one thread when the launch does not say: what ptxas may use under
/// __launch_bounds__(threads, 1).
uint32_t default_registers(uint32_t threads, uint32_t registers_per_sm);
/// Fails if warps of one warpgroup executed different setmaxnreg.
void registers_block_exits(const Block& block);

}  // namespace emulator
