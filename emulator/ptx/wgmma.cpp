// wgmma: each warp of a warpgroup multiplies its 16 rows of A. Between an instruction and the wait
// for its group its accumulators are undefined, and its operands may not change.
#include <algorithm>

#include "emulator/counts/counters.h"
#include "emulator/matrix/layouts.h"
#include "emulator/matrix/wgmma_arithmetic.h"
#include "emulator/ptx/loops.h"

namespace emulator::ptx {

// The accumulators of wgmmas in flight: their values are here until the last of them is waited for.
struct Accumulators {
  std::vector<uint32_t> slots;
  std::vector<float> values;  // [16][n]
};

struct Product {
  WgmmaShape shape;
  MatrixDescriptor a, b;
  bool accumulates;
  std::shared_ptr<Accumulators> sums;
  const Operation* operation;
  bool done = false;
};

struct Products {
  std::deque<std::vector<Product>> groups;  // the last is open
};

namespace {

using Chunk = std::function<const uint8_t*(uint32_t)>;

// Calls f(address) for each chunk of the operands that this warp reads.
template <class F>
void for_chunks(const Product& product, uint32_t first_row, F&& f) {
  const auto over = [&](const MatrixDescriptor& d, Major major, uint32_t first, uint32_t rows) {
    if (major == Major::kK) {
      for (uint32_t row = 0; row < rows; ++row)
        for (uint32_t k = 0; k < kWgmmaK; k += 8) f(element_address(d, major, first + row, k));
    } else {
      for (uint32_t k = 0; k < kWgmmaK; ++k)
        for (uint32_t row = 0; row < rows; row += 8) f(element_address(d, major, first + row, k));
    }
  };
  over(product.a, product.shape.major_a, first_row, kWarpRows);
  over(product.b, product.shape.major_b, 0, static_cast<uint32_t>(product.shape.n));
}

uint32_t first_row(const Warp& warp) { return warp.number % 4 * kWarpRows; }

// The async proxy reads the operands: when the instruction is issued, and until it is waited for.
void note_reads(Warp& warp, const Product& product) {
  for_chunks(product, first_row(warp), [&](uint32_t address) {
    const Place place = shared_place(warp, *product.operation, address, 16, 16);
    const std::string wrong = place.block->shadow.read(
        place.offset, 16,
        {warp.agent, 0, &warp.knows.proxy, &warp.knows.ordinary, warp.now(), 0, true});
    if (!wrong.empty()) fail_at(warp, *product.operation, ErrorKind::Race, wrong);
  });
}

void perform(Warp& warp, Product& product) {
  if (product.done) return;
  product.done = true;
  const int n = product.shape.n;
  float a[kWgmmaK * kWarpRows];
  static thread_local float b[kWgmmaK * kMaxN];
  const auto chunk = [&](uint32_t address) -> const uint8_t* {
    const Place place = shared_place(warp, *product.operation, address, 16, 16);
    return place.block->shared.data() + place.offset;
  };
  read_operand(product.a, product.shape.major_a, product.shape.format,
               static_cast<int>(first_row(warp)), kWarpRows, chunk, a);
  read_operand(product.b, product.shape.major_b, product.shape.format, 0, n, chunk, b);
  std::vector<float>& sums = product.sums->values;
  if (!product.accumulates) std::fill(sums.begin(), sums.end(), 0.f);
  multiply_accumulate(a, b, sums.data(), n);
}

// Registers into sums, or back.
void exchange(Warp& warp, Accumulators& sums, bool back) {
  const auto n = static_cast<uint32_t>(sums.slots.size()) * 2;
  for (uint32_t reg = 0; reg < sums.slots.size(); ++reg) {
    float* values = warp.lanes_of<float>(sums.slots[reg]);
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
      const Position at = wgmma_d(lane, reg);
      float& sum = sums.values[at.row * n + at.col];
      if (back) {
        values[lane] = sum;
      } else {
        sum = values[lane];
      }
    }
    if (!back) std::memset(static_cast<void*>(values), kPoisonByte, kLanes * sizeof(float));
    warp.undefined[sums.slots[reg]] = back ? 0 : kAll;
  }
}

Products& products_of(Warp& warp) {
  if (!warp.products) warp.products = std::make_shared<Products>(), warp.products->groups.resize(1);
  return *warp.products;
}

// list: the accumulators; a and b: the descriptors, c: whether to accumulate.
Step multiply(Warp& warp, const Operation& o, uint32_t lanes) {
  demand_whole_warp(warp, o, lanes);
  if ((warp.undefined[o.a] | warp.undefined[o.b] | warp.undefined[o.c]) != 0)
    fail_at(warp, o, ErrorKind::Uninitialised, "an undefined descriptor or predicate");
  Products& products = products_of(warp);
  Product product;
  product.shape = {o.mode & 1 ? Format::kBFloat16 : Format::kFloat16,
                   static_cast<int>(o.list.size()) * 2, o.mode & 2 ? Major::kMN : Major::kK,
                   o.mode & 4 ? Major::kMN : Major::kK};
  product.a = decode_descriptor(warp.lanes_of<uint64_t>(o.a)[0]);
  product.b = decode_descriptor(warp.lanes_of<uint64_t>(o.b)[0]);
  product.accumulates = warp.predicate(o.c) & 1, product.operation = &o;
  std::string wrong = descriptor_fault(product.a, product.shape.major_a, 64);
  if (wrong.empty())
    wrong =
        descriptor_fault(product.b, product.shape.major_b, static_cast<uint32_t>(product.shape.n));
  if (!wrong.empty()) fail_at(warp, o, ErrorKind::Misuse, "a descriptor " + wrong);
  for (const auto& group : products.groups)
    for (const Product& each : group)
      if (each.sums->slots == o.list) product.sums = each.sums;
  if (!warp.accumulators_fenced && !product.sums)
    fail_at(warp, o, ErrorKind::Misuse, "no wgmma.fence since its registers were written");
  if (!product.sums) {
    product.sums = std::make_shared<Accumulators>();
    product.sums->slots = o.list;
    product.sums->values.resize(o.list.size() * 2 * kWarpRows);
    for (const uint32_t slot : o.list)
      if (product.accumulates && warp.undefined[slot] != 0)
        fail_at(warp, o, ErrorKind::Uninitialised, "adds to undefined registers");
    exchange(warp, *product.sums, false);
  }
  count_wgmma(uint64_t{2} * kWarpRows * static_cast<uint32_t>(product.shape.n) * kWgmmaK);
  note_reads(warp, product);
  products.groups.back().push_back(product);
  return Step::kNext;
}

Step fence(Warp& warp, const Operation& o, uint32_t lanes) {
  demand_whole_warp(warp, o, lanes);
  warp.accumulators_fenced = true;
  return Step::kNext;
}

Step commit(Warp& warp, const Operation& o, uint32_t lanes) {
  demand_whole_warp(warp, o, lanes);
  Products& products = products_of(warp);
  Grid& grid = *warp.block->cluster->grid;
  const Completion when = grid.config.completion;
  if (when == Completion::Early || (when == Completion::Random && grid.random.one_in(2)))
    for (auto& group : products.groups)
      for (Product& each : group) perform(warp, each);
  products.groups.emplace_back();
  warp.accumulators_fenced = false;
  return Step::kNext;
}

Step wait(Warp& warp, const Operation& o, uint32_t lanes) {
  demand_whole_warp(warp, o, lanes);
  Products& products = products_of(warp);
  while (products.groups.size() > o.mode + 1) {
    std::vector<Product> group = std::move(products.groups.front());
    products.groups.pop_front();
    for (Product& each : group) perform(warp, each), note_reads(warp, each);
    while (!group.empty()) {  // the last holder of accumulators gives them back
      const auto sums = group.back().sums;
      std::erase_if(group, [&](const Product& each) { return each.sums == sums; });
      bool still = false;
      for (const auto& later : products.groups)
        for (const Product& each : later) still = still || each.sums == sums;
      if (!still) exchange(warp, *sums, true);
    }
  }
  warp.accumulators_fenced = false;
  return Step::kYield;
}

void make_multiply(Decoder& decoder, const Statement& statement, Operation& made, size_t n,
                   bool bf16) {
  decoder.demand_operands(statement, 8);
  const auto& operands = statement.operands;
  if (operands[0].parts.size() != n / 2)
    decoder.refuse("expected " + std::to_string(n / 2) + " registers");
  for (const Operand& each : operands[0].parts) {
    made.list.push_back(decoder.result(each, 32));
    decoder.accumulates(made.list.back());
  }
  made.a = decoder.source(operands[1], 64), made.b = decoder.source(operands[2], 64);
  made.c = decoder.source(operands[3], 1);
  if (decoder.constant(operands[4]) != 1 || decoder.constant(operands[5]) != 1)
    decoder.refuse("expected operands of scale 1");
  const uint64_t transposed_a = decoder.constant(operands[6]),
                 transposed_b = decoder.constant(operands[7]);
  if (transposed_a > 1 || transposed_b > 1)
    decoder.refuse("expected 0 or 1 for each major dimension");
  made.mode = static_cast<uint32_t>(bf16 | transposed_a << 1 | transposed_b << 2);
  made.run = multiply, made.kind = kWgmma;
}

}  // namespace

void check_products(Warp& warp, const Operation& o) {
  if (!warp.products) return;
  for (const auto& group : warp.products->groups)
    if (!group.empty()) fail_at(warp, o, ErrorKind::ExitCheck, "exits without waiting for wgmma");
}

void add_wgmma(Table& table) {
  for (const bool bf16 : {true, false}) {
    for (size_t n = 8; n <= kMaxN; n += 8) {
      const std::string type = bf16 ? ".bf16" : ".f16";
      table["wgmma.mma_async.sync.aligned.m64n" + std::to_string(n) + "k16.f32" + type + type] =
          [=](Decoder& decoder, const Statement& statement, Operation& made) {
            make_multiply(decoder, statement, made, n, bf16);
          };
    }
  }
  const auto add = [&](const char* opcode, Run run, bool counts) {
    table[opcode] = [=](Decoder& decoder, const Statement& statement, Operation& made) {
      decoder.demand_operands(statement, counts);
      if (counts) made.mode = static_cast<uint32_t>(decoder.constant(statement.operands[0]));
      made.run = run;
    };
  };
  add("wgmma.fence.sync.aligned", fence, false);
  add("wgmma.commit_group.sync.aligned", commit, false);
  add("wgmma.wait_group.sync.aligned", wait, true);
}

}  // namespace emulator::ptx
