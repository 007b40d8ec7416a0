namespace lora_ext::cpu { struct SkinnyKernels; const SkinnyKernels* amx_kernels() { return nullptr; } }
