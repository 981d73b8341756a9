// The gradient of what transformer.h computes, with respect to what it is given; weights stay as they are. Each function
// makes anew what it needs of the layer's inside from the layer's input, so that a whole text's gradient has to hold no
// more than one row of hidden numbers a token and layer.
//
// Weights of F32 and F16 are multiplied as F32, all others as BF16.
#pragma once
#include "base/queue.h"
#include "model/model.h"

namespace heed {

/// d_x [T, in] (+)= d_y [T, out] · w [out, in]: the gradient of y = x · w^T. F32 but for w, which is of any type.
void matmul_backward(Queue&, Tensor w, Tensor d_y, bool accumulate, Tensor d_x);

/// d_x (+)= the gradient of y = x / √(mean x² + eps) · weight at x: all F32 [T, width], contiguous; weight [width] or empty.
void rms_norm_backward(Queue&, Tensor x, Tensor weight, float eps, Tensor d_y, bool accumulate, Tensor d_x);

/// Of finish(): d_x is the gradient of the rows behind the layer and becomes that of the rows `x` [T, hidden] before it, by
/// the ways that lead around attention. d_output [T, hidden]: that of what the output matrix gives (bias included, before any
/// norm of its own); d_attention [T, h·d_v]: that of `attention`. F32, contiguous.
void finish_backward(Queue&, const ModelWeights&, const Architecture&, int layer, Tensor attention, Tensor x,
                     int64_t tile, Tensor d_x, Tensor d_output, Tensor d_attention);

/// Of project(): d_x += what d_q [T, h·d], d_k [T, g·d] and d_v [T, g·d_v] make of it at x.
void project_backward(Queue&, const ModelWeights&, const Architecture&, int layer, Tensor x, int64_t tile, Tensor d_q,
                      Tensor d_k, Tensor d_v, Tensor d_x);

/// Of −Σ log p(targets[i]), p = softmax(logits()), with respect to x [T, hidden] (overwritten: d_x). targets I32 [T]; −1: none.
void prediction_backward(Queue&, const ModelWeights&, const Architecture&, Tensor x, Tensor targets, Tensor d_x);

}  // namespace heed
