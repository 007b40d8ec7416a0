// Runs lora_grouped_gemm_own_weights_sm90a.
#include "emulated/kernels/lora_grouped_own_weights_sm90a.h"

#include "emulated/kernels/own_weights_case.h"

namespace kernels {

#define VARIANT(name, ...) \
  {#name,                  \
   [](const Case& run) { return OwnWeightsGemm<Alignment::kVector, __VA_ARGS__>(run).run(); }},
const Program program{"lora_grouped_own_weights_sm90a",
                      {LORA_GROUPED_OWN_WEIGHTS_SM90A_VARIANTS(VARIANT)},
                      {{"even", 256, 256, 128},
                       {"odd", 131, 77, 99},
                       {"tall", 600, 65, 24},
                       {"wide", 70, 600, 200},
                       {"deep", 40, 24, 700},
                       {"tiny", 1, 1, 5}}};

}  // namespace kernels
