#include "attention/numbers.h"

#include <algorithm>

namespace heed {

Num::Num(Numbers::Op op, std::initializer_list<const Num*> inputs, const Tensor& data) {
  int count = 0;
  for (const Num* input : inputs) {
    const Numbers& p = input->program_;
    require(count + p.count < Numbers::most, "Num",
            "a formula of more than " + std::to_string(Numbers::most) + " steps", "compute a part of it first");
    std::copy_n(p.steps.begin(), p.count, program_.steps.begin() + count);
    count += p.count;
  }
  Numbers::Step& last = program_.steps[size_t(count)];
  last.op = op;
  if (op == Numbers::Op::Load || op == Numbers::Op::Find || op == Numbers::Op::Has || op == Numbers::Op::Matches) {
    require(data.contiguous(), "Num", "numbers are loaded from contiguous tensors, not " + data.shape());
    last.type = data.type, last.data = data.data, last.size = data.numel();
  }
  program_.count = count + 1;
}

Tensor compute(Queue& queue, Dtype type, std::initializer_list<int64_t> sizes, const Num& what) {
  const Tensor out = queue.scratch.take(type, sizes);
  compute(queue, what, out);
  return out;
}

void compute(Queue& queue, const Num& what, const Tensor& out) {
  queue.run->compute(queue, what.program(), nullptr, out);
}

void compute(Queue& queue, const Ragged& over, const Num& what, const Tensor& out) {
  queue.run->compute(queue, what.program(), &over, out);
}

Tensor offsets_of(Queue& queue, int64_t count, const Num& length) {
  const Tensor out = queue.scratch.take(Dtype::I64, {count + 1});
  Scratch scope(queue.scratch);
  queue.run->offsets(queue, compute(queue, Dtype::I64, {count}, length), out);
  return out;
}

}  // namespace heed
