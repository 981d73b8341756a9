#include "attention/inputs.h"

namespace heed {

Tensor given(const LayerView& at, const std::string& name, const std::string& shape, std::initializer_list<int64_t> sizes) {
  const Tensor input = at.input(name, shape);
  int64_t numbers = 1;
  for (int64_t size : sizes) numbers *= size;
  require(input.numel() == numbers && input.type == Dtype::F32, "--input", name + " is " + input.shape() + ", not " + shape);
  return input.reshape(sizes);
}

bool is_given(const LayerView& at, const std::string& name) { return at.inputs && at.inputs->contains(name); }

Ragged given_instead(const LayerView& at, const Ragged& x, const std::string& name, const std::string& shape) {
  Ragged out = x;
  if (is_given(at, name)) out.values = given(at, name, shape, {x.values.size[0], x.values.size[1]});
  return out;
}

Ragged heads_of(Queue& queue, const Tensor& rows, int64_t heads, int64_t length) {
  Ragged out;
  out.values = rows.reshape({heads * length, rows.numel() / (heads * length)});
  out.offsets = compute(queue, Dtype::I64, {heads + 1}, index() * length);
  out.heads = heads, out.bound = heads * length;
  return out;
}

}  // namespace heed
