// Runs lora_grouped_gemm_own_weights_sm80, also with operands at odd addresses.
#include "emulated/kernels/lora_grouped_own_weights.h"

#include "emulated/kernels/own_weights_case.h"

namespace kernels {

#define RUN(name, alignment, ...) \
  {#name, [](const Case& run) { return OwnWeightsGemm<alignment, __VA_ARGS__>(run).run(); }},
#define VARIANT(name, ...) RUN(name, Alignment::kVector, __VA_ARGS__)
#define ELEMENT_VARIANT(name, ...) RUN(name, Alignment::kElement, __VA_ARGS__)
#ifdef EVERY_INSTANCE  // more steps than stages, by elements in the main loop and behind it
#define SIZE_OF_STEPS {"deep", 300, 24, 330},
#else
#define SIZE_OF_STEPS
#endif
const Program program{"lora_grouped_own_weights",
                      {LORA_GROUPED_OWN_WEIGHTS_VARIANTS(VARIANT)
                           LORA_GROUPED_OWN_WEIGHTS_ELEMENT_VARIANTS(ELEMENT_VARIANT)},
                      {{"even", 256, 128, 128},
                       {"odd", 131, 77, 99},
                       {"tall", 600, 65, 24},
                       {"wide", 70, 300, 200},
                       SIZES_OF_SLABS SIZE_OF_STEPS{"tiny", 1, 1, 5}}};

}  // namespace kernels
