// oneDNN's microkernel C (+)= A B of floats, batch-reduce GEMM, as libtorch_cpu exports it
// (ATen/native/CPUBlas.h), and the processors on which a layer's product is one pass: of panels of
// floats by it, of bfloat16 by a walk of our own.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "common/dtype.h"
#include "cpu/fused_gemm.h"

namespace lora_ext::cpu {

// What the rules ask of a processor; the last two: of the library's microkernel there, and of our
// walks (AMX, AVX512_BF16).
struct Processor {
  bool is_intel, has_amx, has_float16;
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

// "auto", "none", or "float32" or "bfloat16" wherever there are products of them; false: another name.
bool set_panels(const std::string& name);

// C (+)= A times a panel: m rows of A, at a pitch of a_pitch elements; C is [m, 64]; `add`: to what
// it has.
void multiply_panel(int64_t m, int64_t k, const float* a, int64_t a_pitch, const float* panel,
                    bool add, float* c);

}  // namespace lora_ext::cpu
