// The rows of each adapter are one call of library_route.h on a given y: they are gathered, and
// dropout is applied beforehand, with the row numbers that they have in x. Of an expert that y is the
// product with its own weight.
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include "common/base_linear.h"
#include "common/rows.h"
#include "op/library/library_route.h"

namespace lora_ext::library_route {
namespace {

// Gathers the rows of one segment from the tensors of the call, and writes them back.
class Rows {
 public:
  Rows(const Segments& segments, const Segment& segment, const Update& update,
       const at::Device& device)
      : at_(segments.order.data() + segment.begin),
        count_(segment.count),
        experts_(update.experts()) {
    if (is_range()) return;
    auto* data = const_cast<int32_t*>(at_);
    index_ = at::from_blob(data, {count_}, at::TensorOptions(at::kInt)).to(device);
  }

  at::Tensor of(const at::Tensor& tensor) const {
    return is_range() ? tensor.narrow(0, at_[0], count_) : tensor.index_select(0, index_);
  }
  at::Tensor of_x(const at::Tensor& x) const {
    return experts_ && experts_->x ? x.index_select(0, of(*experts_->x)) : of(x);
  }
  at::Tensor of_grad(const at::Tensor& grad) const {
    return experts_ && experts_->grad ? grad.index_select(0, of(*experts_->grad)) : of(grad);
  }
  // `rows` times their weights, at least in float32, if they have some.
  at::Tensor weighted(const at::Tensor& rows) const {
    return experts_ && experts_->weights ? rows.mul(of(experts_->row_weights()).unsqueeze(1))
                                         : rows;
  }
  void put(at::Tensor& tensor, const at::Tensor& rows) const {
    if (is_range()) {
      tensor.narrow(0, at_[0], count_).copy_(rows);
    } else {
      tensor.index_copy_(0, index_.to(at::kLong), rows);
    }
  }
  // rows *= keep_scale * mask, with the row numbers of the call.
  void drop(at::Tensor& rows, const DropoutArgs& dropout) const {
    if (experts_) return drop_rows_(rows, of(*experts_->mask).to(at::kLong), dropout);
    for (int64_t begin = 0, end = 0; begin < count_; begin = end) {
      while (end < count_ && at_[end] - at_[begin] == end - begin) ++end;
      at::Tensor run = rows.narrow(0, begin, end - begin);
      drop_(run, dropout, at_[begin]);
    }
  }

 private:
  bool is_range() const { return at_[count_ - 1] - at_[0] == count_ - 1; }

  const int32_t* at_;
  int64_t count_;
  const ExpertRows* experts_;
  at::Tensor index_;
};

// A pool of experts as the factors were before they were padded and split.
at::Tensor whole(const at::Tensor& pool, int64_t rank_dim, const ExpertRows& experts) {
  const int64_t terms = experts.float_adapters ? 2 : 1, width = pool.size(rank_dim) / terms;
  if (pool.size(rank_dim) == experts.rank) return pool;
  const at::Tensor hi = pool.narrow(rank_dim, 0, experts.rank);
  if (!experts.float_adapters) return hi;
  const double scale = kernel_dtype(dtype_of(pool.scalar_type())).lo_scale;
  const at::Tensor lo = pool.narrow(rank_dim, width, experts.rank).to(at::kFloat);
  return lo.mul_(1 / scale).add_(hi);
}

Update whole(const Update& update) {
  Update own = update;
  if (update.experts() == nullptr) return own;
  own.lora_a = {whole(update.lora_a[0], 1, *update.experts())};
  own.lora_b = {whole(update.lora_b[0], 2, *update.experts())};
  return own;
}

at::Tensor factor_of(at::TensorList factors, bool pool, int64_t rank_dim, const Segment& segment) {
  return pool ? factors[0].select(0, segment.adapter).narrow(rank_dim, 0, segment.rank)
              : factors[static_cast<size_t>(segment.adapter)];
}

// The adapter of one segment, without dropout: it has been applied to the rows.
Update update_of(const Update& update, const Segment& segment, const double* scaling) {
  const bool pool = update.is_pool();
  return Update::one(factor_of(update.lora_a, pool, 0, segment),
                     factor_of(update.lora_b, pool, 1, segment), scaling[segment.adapter]);
}

// drop(X) of the rows, for a y of the given dtype. With dropout it is in the adapters' dtype, and
// at least in float32 for a y wider than half: x divided by the keep probability is then not
// rounded to half.
at::Tensor inputs_of(const at::Tensor& x, const Update& update, at::ScalarType y,
                     const Rows& rows) {
  at::Tensor own = rows.of_x(x);
  if (!update.dropout.enabled()) return own;
  const at::ScalarType adapters = update.lora_a[0].scalar_type();
  const at::ScalarType wide = is_half(y) ? adapters : c10::promoteTypes(adapters, at::kFloat);
  own = own.to(wide, /*non_blocking=*/false, /*copy=*/true);
  rows.drop(own, update.dropout);
  return own;
}

// That of the segment's expert.
template <class Args>
Base base_of(const Args& args, const Segment& segment) {
  return args.base.of(args.update.experts()->expert_of(segment.adapter));
}

at::Tensor scaling_on_host(const Update& update) {
  const auto options = at::TensorOptions(at::kCPU).dtype(at::kDouble);
  const at::Tensor& scaling = update.grouping->scaling;
  if (!scaling.defined()) return at::full({update.adapters()}, update.scaling, options);
  return scaling.to(options).contiguous();
}

// The gradients that are requested. With a pool, all adapters write into one tensor.
struct Gradients {
  Gradients(at::TensorList factors, const NeedsGrad& wanted) : each(factors.size()) {
    for (size_t i = 0; i < factors.size(); ++i) {
      if (wanted[i]) each[i] = at::zeros(factors[i].sizes(), factors[i].options());
    }
  }
  bool wants(bool pool, const Segment& segment) const {
    return each[pool ? 0 : static_cast<size_t>(segment.adapter)].defined();
  }
  void put(bool pool, int64_t rank_dim, const Segment& segment, const at::Tensor& gradient) {
    factor_of(each, pool, rank_dim, segment).copy_(gradient);
  }
  Factors each;
};

}  // namespace

Forward forward_grouped(const ForwardArgs& args) {
  const Update update = whole(args.update);
  const int64_t count = update.rows(args.x);
  const bool own_bases = args.base.of_experts();
  const Segments segments = segments_of(args.base.op(), update, count);
  const at::Tensor scaling = scaling_on_host(update);
  const at::ScalarType sums = accumulation_dtype(args.x.scalar_type());
  Forward out{own_bases ? at::zeros({count, update.out_features()}, args.x.options())
                        : base_forward(args.x, args.base),
              at::zeros({count, update.rank()}, args.x.options().dtype(sums))};
  for (const Segment& segment : segments.list) {
    const Rows rows(segments, segment, update, args.x.device());
    const at::Tensor y =
        own_bases ? base_forward(rows.of_x(args.x), base_of(args, segment)) : rows.of(out.y);
    const Forward own =
        forward({inputs_of(args.x, update, out.y.scalar_type(), rows), Base::given(y),
                 update_of(update, segment, scaling.const_data_ptr<double>())});
    rows.put(out.y, own.y);
    at::Tensor s = out.s.narrow(1, 0, segment.rank);
    rows.put(s, own.s);
  }
  return out;
}

Backward backward_grouped(const BackwardArgs& args) {
  const Update update = whole(args.update);
  const bool pool = update.is_pool(), own_bases = args.base.of_experts();
  const int64_t count = update.rows(args.x);
  const Segments segments = segments_of(args.base.op(), update, count);
  const at::Tensor scaling = scaling_on_host(update);
  at::Tensor dx;
  if (args.wanted.dx) {
    dx = own_bases ? at::zeros({count, args.x.size(1)}, args.x.options())
                   : base_backward(args.grad, args.x, args.base);
  }
  Gradients da(update.lora_a, args.wanted.dlora_a), db(update.lora_b, args.wanted.dlora_b);
  for (const Segment& segment : segments.list) {
    const bool need_a = da.wants(pool, segment), need_b = db.wants(pool, segment);
    const Rows rows(segments, segment, update, args.x.device());
    const at::Tensor grad = rows.of_grad(args.grad);
    const at::Tensor x = inputs_of(args.x, update, args.grad.scalar_type(), rows);
    Backward own = backward({grad, rows.weighted(x), Base::given(),
                             update_of(update, segment, scaling.const_data_ptr<double>()),
                             rows.weighted(rows.of(args.s.narrow(1, 0, segment.rank))).contiguous(),
                             Wanted::one(args.wanted.dx, need_a, need_b)});
    if (need_a) da.put(pool, 0, segment, own.da());
    if (need_b) db.put(pool, 1, segment, own.db());
    if (!args.wanted.dx) continue;
    at::Tensor delta = own.dx;
    if (update.dropout.enabled()) rows.drop(delta, update.dropout);
    const at::Tensor base =
        own_bases ? base_backward(grad, x, base_of(args, segment)) : rows.of(dx);
    rows.put(dx, base.add(delta.to(dx.scalar_type())));
  }
  if (update.experts()) {  // in PEFT's layout, [G r, K] and [N, r G]
    const int64_t all = update.adapters() * update.rank();
    at::Tensor &own_a = da.each[0], &own_b = db.each[0];
    if (own_a.defined()) own_a = own_a.view({all, -1});
    if (own_b.defined()) own_b = own_b.permute({1, 2, 0}).reshape({-1, all});
  }
  return {dx, da.each, db.each};
}

}  // namespace lora_ext::library_route
