// The kernels' instances that the programs of kernels/ compile: files that include this header link
// them rather than compile their own.
#pragma once
#include "emulated/kernels/dequantize.h"
#include "emulated/kernels/lora_decode.h"
#include "emulated/kernels/lora_dsdb_sm80.h"
#include "emulated/kernels/lora_experts.h"
#include "emulated/kernels/lora_gemm_sm80.h"
#include "emulated/kernels/lora_gemm_sm90a.h"
#include "emulated/kernels/lora_grouped_gemm.h"
#include "emulated/kernels/lora_grouped_own_weights.h"
#include "emulated/kernels/lora_grouped_own_weights_sm90a.h"
#include "emulated/kernels/lora_grouped_segments.h"
#include "emulated/kernels/lora_grouped_shrink.h"
#include "emulated/kernels/lora_grouped_wgrad.h"
#include "emulated/kernels/lora_shrink_sm80.h"
#include "emulated/kernels/lora_split.h"
#include "emulated/kernels/lora_wgrad_sm80.h"
