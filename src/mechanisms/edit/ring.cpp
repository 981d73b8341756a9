#include "mechanisms/edit/ring.h"

#include <algorithm>

#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {
namespace {

/// Rows begin … end − 1 of each of `heads` runs of `stride` rows.
Ragged rows(Queue& queue, const Tensor& values, int64_t heads, int64_t stride, int64_t begin, int64_t end) {
  Ragged out;
  out.values = values.reshape({heads * stride, values.size[2]});
  out.heads = heads, out.bound = heads * stride;
  out.offsets = compute(queue, Dtype::I64, {heads + 1}, pick(index() < heads, index() * stride + begin, heads * stride));
  out.ends = compute(queue, Dtype::I64, {heads}, index() * stride + end);
  return out;
}

}  // namespace

void ring_attention(Comm& comm, Queue& queue, const Shards& shards, Tensor q, Tensor k, Tensor v, const Mods& mods,
                    bool causal, Tensor out, Tensor lse) {
  const int ranks = comm.size(), me = comm.rank();
  const int64_t h = q.size[0], n = q.size[1], g = k.size[0], c = k.size[1], d_v = v.size[2], before = shards.m - shards.n;
  const int64_t first = shards.q_begin(me);
  const Scratch scratch(queue.scratch);
  const Tensor next_k = queue.scratch.take(k.type, {g, c, k.size[2]}), next_v = queue.scratch.take(v.type, {g, c, d_v});
  const Tensor spare_k = queue.scratch.take(k.type, {g, c, k.size[2]}), spare_v = queue.scratch.take(v.type, {g, c, d_v});
  // Part 0 is what is merged so far, part 1 the shard at hand.
  const Tensor outs = queue.scratch.take(Dtype::F32, {2, h * n, d_v}), lses = queue.scratch.take(Dtype::F32, {2, h * n});
  queue.fill(outs, 0);
  compute(queue, -kInfinity, lses);
  const Tensor flat_out = out.reshape({h * n, d_v}), flat_lse = lse.reshape({h * n});

  Tensor here_k = k, here_v = v, to_k = next_k, to_v = next_v;
  for (int step = 0; step < ranks; ++step) {
    const bool more = step + 1 < ranks;
    Comm::Ticket keys = 0, values = 0;
    if (more) keys = comm.start_ring(here_k, to_k), values = comm.start_ring(here_v, to_v);
    const Scratch inner(queue.scratch);
    const int source = (me - step + ranks) % ranks;
    const int64_t begin = shards.k_begin(source), end = shards.k_begin(source + 1);
    Mods own;
    own.scale = mods.scale, own.softcap = mods.softcap, own.window = mods.window;
    if (mods.window > 0) {
      own.q_pos = compute(queue, Dtype::I32, {h * n}, load(shards.q_pos, first + mod(index(), n)));
      const Num j = mod(index(), c);
      own.k_pos = compute(queue, Dtype::I32, {g * c}, pick(j < end - begin, load(shards.k_pos, begin + j), 0));
    }
    const Tensor part = outs.select(0, 1), part_lse = lses.select(0, 1);
    queue.fill(part, 0);
    compute(queue, -kInfinity, part_lse);
    auto attend = [&](int64_t from, int64_t to, int64_t key_end, bool triangle) {
      if (from >= to || key_end <= begin) return;
      Plan plan;
      plan.causal = triangle;
      queue.run->attend(queue, rows(queue, q, h, n, from, to), rows(queue, here_k, g, c, 0, key_end - begin),
                        rows(queue, here_v, g, c, 0, key_end - begin), plan, own, part, part_lse);
    };
    // Rows before `whole` see a part of the shard: cut where the last of them looks, it lies bottom-right. The rest see all.
    const int64_t whole = causal ? std::clamp<int64_t>(end - before - first, 0, n) : 0;
    attend(0, whole, std::min(end, before + first + whole), true);
    attend(whole, n, end, false);
    queue.run->merge(queue, outs, lses, flat_out, flat_lse);
    queue.move(flat_out, outs.select(0, 0)), queue.move(flat_lse, lses.select(0, 0));
    if (!more) break;
    comm.finish(keys), comm.finish(values);
    // The caller's own shard is never written: the third buffer takes its turn.
    here_k = to_k, here_v = to_v;
    to_k = here_k.data == next_k.data ? spare_k : next_k, to_v = here_v.data == next_v.data ? spare_v : next_v;
  }
}

namespace {

struct Ring final : Mechanism {
  int ranks;

  static std::vector<ParamInfo> params() {
    return {param(&Ring::ranks, "ranks", 4, 1, 256, "ranks, each a thread with its own shard")};
  }

  // The layer's attention once more, by ranks that see only what the ring brings them.
  Tensor edit(LayerView& at) const override {
    if (at.decoding() || at.phase == Phase::Replay) return at.out;
    const Mods& mods = at.mods;
    require(!mods.key_bias && !mods.row_factor && !mods.temperature && !mods.gain && !mods.sink_logits && !mods.until &&
                !mods.k_map,
            "ring", "logit biases, gains and maps do not travel around the ring");
    const Tensor out = at.queue.scratch.take(Dtype::F32, {at.out.size[0], at.out.size[1]});
    // Heads may hold different numbers of entries, so each KV head takes its own turn around the ring.
    int64_t key = 0;
    for (int64_t s = 0; s < at.k.segments(); key += at.key_rows[size_t(s++)]) around(at, s, key, out);
    return out;
  }

  void around(LayerView& at, int64_t kv, int64_t key, const Tensor& out) const {
    const int64_t group = at.q.heads / at.k.heads, d = at.q.values.size[1], d_v = at.v.values.size[1],
                  sequence = kv / at.k.heads;
    Shards shards{at.rows[size_t(sequence)], at.key_rows[size_t(kv)], ranks};
    if (shards.n == 0) return;
    int64_t row = kv % at.k.heads * group * shards.n;  // of the first query
    for (int64_t s = 0; s < sequence; ++s) row += at.q.heads * at.rows[size_t(s)];
    const Tensor queries = at.q.values.slice(0, row, row + group * shards.n),
                 outputs = out.slice(0, row, row + group * shards.n);
    const Tensor keys = at.k.values.slice(0, key, key + shards.m), values = at.v.values.slice(0, key, key + shards.m);
    shards.q_pos = at.q_pos.slice(0, row, row + shards.n), shards.k_pos = at.k_pos.slice(0, key, key + shards.m);
    const int64_t c = (shards.m + ranks - 1) / ranks;
    run_ranks(
        ranks,
        [&](Comm& comm) {
          const int r = comm.rank();
          const int64_t from = shards.q_begin(r), n = shards.q_begin(r + 1) - from, begin = shards.k_begin(r),
                        end = shards.k_begin(r + 1);
          Queue queue(&at.queue);
          const Tensor q = queue.scratch.take(Dtype::F32, {group, n, d}),
                       k = queue.scratch.take(at.k.values.type, {1, c, d}),
                       v = queue.scratch.take(at.v.values.type, {1, c, d_v});
          const Tensor part = queue.scratch.take(Dtype::F32, {group, n, d_v}),
                       lse = queue.scratch.take(Dtype::F32, {group, n});
          // A short last shard is padded with rows that no one attends to.
          queue.fill(k, 0), queue.fill(v, 0);
          for (int64_t i = 0; i < group; ++i)
            queue.move(queries.slice(0, i * shards.n + from, i * shards.n + from + n), q.select(0, i));
          queue.move(keys.slice(0, begin, end), k.select(0, 0).slice(0, 0, end - begin));
          queue.move(values.slice(0, begin, end), v.select(0, 0).slice(0, 0, end - begin));
          ring_attention(comm, queue, shards, q, k, v, at.mods, at.plan.causal, part, lse);
          for (int64_t i = 0; i < group; ++i)
            queue.move(part.select(0, i), outputs.slice(0, i * shards.n + from, i * shards.n + from + n));
        },
        &at.queue);
  }
};

}  // namespace

Entry ring() {
  Entry e = entry<Ring>("ring", "Ring Attention with Blockwise Transformers for Near-Infinite Context",
                        "Liu et al., 2023, arXiv 2310.01889", 2023, uint8_t(Role::Edit));
  e.equation = "rank r: merge over s of attend(Q_r, K_(r−s), V_(r−s)), keys and values passed on at each step";
  e.needs = "nothing; prompts only";
  e.identity = "ring(ranks=4)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
