// The main program of a kernel's host program: a table of its instances by name.
#pragma once
#include <string>
#include <vector>

#include "emulated/kernels/driver.h"

namespace kernels {

struct Variant {
  const char* name;
  std::string (*run)(const kernels::Case&);
};

// Blocks of `size` that cover `count`, as a grid wants them.
inline unsigned blocks_of(int count, int size) {
  return static_cast<unsigned>((count + size - 1) / size);
}

inline int variants_main(int argc, char** argv, const char* name,
                         const std::vector<kernels::Size>& sizes,
                         const std::vector<Variant>& variants) {
  Program program{
      .name = name, .sizes = sizes, .variants = {}, .run = {}, .flops = kernels::gemm_flops};
  for (const Variant& variant : variants) program.variants.push_back(variant.name);
  program.run = [&](const kernels::Case& run) -> std::string {
    for (const Variant& variant : variants)
      if (run.variant == variant.name) return variant.run(run);
    return "no such variant";
  };
  return kernels::program_main(argc, argv, program);
}

}  // namespace kernels
