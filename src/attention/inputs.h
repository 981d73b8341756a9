// Tensors that `heed apply --input` gives a mechanism, checked.
#pragma once
#include "attention/mechanism.h"

namespace heed {

/// An input with these sizes (its rank may be another), F32; throws Error(Invalid) that names it and its shape when it is
/// missing or does not fit.
Tensor given(const LayerView&, const std::string& name, const std::string& shape, std::initializer_list<int64_t> sizes);
/// Whether there is an input of that name.
bool is_given(const LayerView&, const std::string& name);
/// x with an input's numbers in place of its own, if there is one of that name: of x's rows and width.
Ragged given_instead(const LayerView&, const Ragged& x, const std::string& name, const std::string& shape);
/// `heads` segments of `length` rows each.
Ragged heads_of(Queue&, const Tensor& rows, int64_t heads, int64_t length);

}  // namespace heed
