#include "lab/apply.h"

#include <algorithm>
#include <chrono>

#include "attention/on_host.h"
#include "attention/plans.h"
#include "attention/rotation.h"
#include "mechanisms/registry.h"
#include "model/session.h"

namespace heed {
namespace {

Dtype float_type(Dtype type, const char* where) {
  if (type == Dtype::F32 || type == Dtype::BF16 || type == Dtype::F16) return type;
  throw Error(Code::Invalid, where, std::string("'") + info(type).name + "' is no type to attend in",
              "f32, bf16 or f16");
}

PageType page_type(Dtype type) {
  PageType page;
  page.kind = type == Dtype::F32    ? PageType::Kind::F32
              : type == Dtype::BF16 ? PageType::Kind::BF16
                                    : PageType::Kind::F16;
  return page;
}

bool real(Dtype type) { return type == Dtype::F32 || type == Dtype::F64 || type == Dtype::F16 || type == Dtype::BF16; }

/// "w1 [8d, d], b1 [8d]: the first matrix" → w1, b1.
std::vector<std::string> names_in(const std::string& input) {
  std::vector<std::string> out;
  const std::string shapes = input.substr(0, input.find(':'));
  for (size_t end = shapes.find(" ["); end != std::string::npos; end = shapes.find(" [", end + 1)) {
    const size_t space = shapes.find_last_of(' ', end - 1);
    out.push_back(shapes.substr(space + 1, end - space - 1));
  }
  return out;
}

/// What to say of inputs that none of the mechanisms takes: a wrong name, as a rule.
std::vector<std::string> unused_inputs(const std::map<std::string, Tensor>& inputs, const std::string& spec,
                                       const ModelInfo& model) {
  std::vector<std::string> taken, notes;
  for (const Spec& part : value_or_throw(parse_spec(spec)))
    for (const std::string& input : inputs_of(part, model))
      for (std::string& name : names_in(input)) taken.push_back(std::move(name));
  std::string list;
  for (const std::string& name : taken) list.append(list.empty() ? "" : ", ").append(name);
  const auto note = [&](const std::string& name) {
    return "--input '" + name + "' is not read: " + spec + " takes " + (list.empty() ? "none" : list);
  };
  for (const auto& [name, tensor] : inputs)
    if (std::find(taken.begin(), taken.end(), name) == taken.end()) notes.push_back(note(name));
  return notes;
}

/// One layer without a model: h heads of n queries over g heads of m keys.
class Harness {
 public:
  Harness(const std::string& spec, const ApplyInput& in)
      : in_(in), queue_(&backend(in.backend, in.device), *backend(in.backend, in.device).memory), host_(queue_) {
    check(in);
    h_ = in.q.size[0], n_ = in.q.size[1], g_ = in.k.size[0], m_ = in.k.size[1];
    model_.architecture = "apply";
    model_.h = int(h_), model_.g = int(g_), model_.d = int(in.q.size[2]), model_.d_v = int(in.v.size[2]);
    model_.scale = in.scale;
    composition_ = value_or_throw(Composition::parse(spec, model_, registry()));
    if (!in.inputs.empty()) output_.notes = unused_inputs(in.inputs, composition_.text(), model_);

    const Dtype type = float_type(in.dtype, "--dtype");
    auto placed = [&](const Tensor& from, Dtype as) {
      Buffer host(as, std::span(from.size.data(), size_t(from.rank)));
      copy(from, host);
      return queue_.upload(host);
    };
    q_ = placed(in.q, Dtype::F32).reshape({h_ * n_, model_.d});
    k_ = placed(in.k, type).reshape({g_ * m_, model_.d}), v_ = placed(in.v, type).reshape({g_ * m_, model_.d_v});
    q_offsets_ = steps(h_, n_), k_offsets_ = steps(g_, m_);
    std::vector<int32_t> q_pos, k_pos;
    for (int64_t r = 0; r < g_ * m_; ++r) k_pos.push_back(position(r % m_));
    for (int64_t r = 0; r < h_ * n_; ++r) q_pos.push_back(position(m_ - n_ + r % n_));
    q_pos_ = queue_.upload(q_pos), k_pos_ = queue_.upload(k_pos);
    for (const auto& [name, tensor] : in.inputs)
      inputs_[name] = placed(tensor, real(tensor.type) ? Dtype::F32 : tensor.type);

    StoreOptions options;  // keys come as they are read: without a rotation of its own the store keeps none plain
    options.k = options.v = page_type(type);
    StoreShape shape{int(g_), model_.d, model_.d_v};
    bool quantised = false;
    Needs types;
    for (const Composition::Part& p : composition_.parts()) {
      if (has(p.roles, Role::Drive))
        throw Error(Code::Unsupported, "apply", p.entry->name + " feeds a model its own way",
                    "use it with a model: heed run, heed eval");
      const Needs needs = p.mechanism->needs(model_);
      options.bias |= needs.bias;
      if (needs.positions != Read::Positions::True) positions_ = needs.positions;
      options.columns.insert(options.columns.end(), needs.columns.begin(), needs.columns.end());
      if (needs.slots.group > 0) options.slots = needs.slots, shape.slots = true;
      if (needs.quantised) quantised = true, types = needs;
      states_.push_back(p.mechanism->open(model_));
      if (needs.basis) basis_ = heed::placed(queue_, p.mechanism->basis(model_));
    }
    if (basis_.k) turn(q_, q_offsets_, basis_.k, q_), turn(k_, k_offsets_, basis_.k, k_);
    if (basis_.v) turn(v_, k_offsets_, basis_.v, v_);
    store_ = std::make_unique<Store>(queue_, std::span(&shape, 1), options);
    if (quantised)
      store_->add_layout(types.quantised_k.quantised() ? types.quantised_k : options.k,
                         types.quantised_v.quantised() ? types.quantised_v : options.v);
    if (!types.points.empty()) store_->layer(0).set_points(1, types.points[0]);
  }

  ApplyOutput run() {
    if (int p = composition_.owner(Role::State, 0); p >= 0) return recur(p);
    LayerView at = view(Phase::Prompt);
    at.q = {q_, q_offsets_, {}, h_, h_ * n_}, at.k = {k_, k_offsets_, {}, g_, g_ * m_},
    at.v = {v_, k_offsets_, {}, g_, g_ * m_};
    at.q_pos = at.mods.q_pos = q_pos_, at.k_pos = at.mods.k_pos = k_pos_;
    at.plan.causal = in_.causal;
    at.out = queue_.scratch.take(Dtype::F32, {h_ * n_, model_.d_v}), at.lse = queue_.scratch.take(Dtype::F32, {h_ * n_});
    store_->layer(0).append(queue_, at.k, at.v, k_pos_, std::span(&m_, 1));
    if (in_.beside_dense) {
      begin();
      queue_.run->attend(queue_, at.q, at.k, at.v, at.plan, at.mods, at.out, at.lse);
      lap("dense");
    }
    begin();

    const int planner = composition_.owner(Role::Plan, 0), reader = composition_.owner(Role::Read, 0),
              keeper = composition_.owner(Role::Keep, 0);
    if (planner >= 0) {
      Plan plan = enter(at, planner).plan(at);
      plan.causal = in_.causal;
      at.plan = limit_heads(at, plan, at.k, m_, part(planner).heads);
      lap("plan");
    }
    queue_.run->attend(queue_, at.q, at.k, at.v, at.plan, at.mods, at.out, at.lse);
    lap("attend");
    density_ = density(queue_, at.plan, at.q, {.panel = &at.k, .pages = nullptr, .read = nullptr}, at.mods);
    begin();
    for (int p : composition_.edits(0)) at.out = enter(at, p).edit(at);
    for (size_t p = 0; p < states_.size(); ++p) enter(at, int(p)).observe(at);
    lap("edit");
    if (planner >= 0) export_plan(at);
    if (reader >= 0) read(at, reader);
    if (keeper >= 0) keep(at, keeper);

    if (basis_.v) turn(at.out, q_offsets_, basis_.v_back, at.out);
    add("out", Dtype::F32, {h_, n_, model_.d_v}, at.out);
    add("lse", Dtype::F32, {h_, n_}, at.lse);
    Buffer share(Dtype::F32, {h_});
    for (int64_t head = 0; head < h_; ++head) share->at<float>(head) = float(density_[size_t(head)]);
    output_.arrays.emplace_back("density", std::move(share));
    return std::move(output_);
  }

 private:
  static void check(const ApplyInput& in) {
    const Tensor &q = in.q, &k = in.k, &v = in.v;
    for (const auto& [name, t] : {std::pair{"--q", &q}, std::pair{"--k", &k}, std::pair{"--v", &v}}) {
      require(t->rank == 3 && t->data && real(t->type), name,
              "is " + t->shape() + "; three dimensions of real numbers are needed", "heads, tokens, channels");
      require(t->size[0] >= 1 && t->size[1] >= 1 && t->size[2] >= 1 && t->size[2] <= 4096 && t->size[0] <= 65536 &&
                  t->size[1] < (int64_t(1) << 30),
              name, t->shape() + " is empty or too large");
    }
    require(q.size[2] == k.size[2], "--k",
            "keys are " + std::to_string(k.size[2]) + " wide and queries " + std::to_string(q.size[2]));
    require(k.size[0] == v.size[0] && k.size[1] == v.size[1], "--v", "v is " + v.shape() + " and k " + k.shape(),
            "the same heads and tokens are needed");
    require(q.size[0] % k.size[0] == 0, "--q",
            std::to_string(q.size[0]) + " query heads are no multiple of " + std::to_string(k.size[0]) + " KV heads");
    require(q.size[1] <= k.size[1], "--q",
            std::to_string(q.size[1]) + " queries over " + std::to_string(k.size[1]) + " keys",
            "queries are the last of the keys' positions");
    require(in.scale >= 0, "--scale", "is no number from 0 on", "0 stands for 1/sqrt(d)");
    const Tensor& at = in.positions;
    if (!at) return;
    require(at.rank == 1 && at.type == Dtype::I32 && at.size[0] == k.size[1], "--positions",
            "is " + at.shape() + "; one 32-bit number for each of " + std::to_string(k.size[1]) + " keys is needed");
    for (int64_t j = 0; j < at.size[0]; ++j)
      require(at.at<int32_t>(j) >= 0 && (j == 0 || at.at<int32_t>(j) > at.at<int32_t>(j - 1)), "--positions",
              "positions must ascend from 0 or more");
  }

  int32_t position(int64_t key) const { return in_.positions ? in_.positions.at<int32_t>(key) : int32_t(key); }

  Tensor steps(int64_t count, int64_t step) { return compute(queue_, Dtype::I64, {count + 1}, index() * step); }

  /// Rows of segments that lie end to end, in other coordinates (Basis).
  void turn(const Tensor& rows, const Tensor& offsets, const Buffer& matrix, const Tensor& to) {
    const int64_t segments = offsets.size[0] - 1, count = rows.size[0];
    const Tensor wide = queue_.scratch.take(Dtype::F32, {count, rows.size[1]});
    compute(queue_, load(rows, index()), wide);
    change_basis(queue_, {wide, offsets, {}, segments, count}, matrix, {to, offsets, {}, segments, count});
  }

  LayerView view(Phase phase) {
    LayerView at(model_, queue_, 0, phase);
    at.prompt = {m_}, at.rows = {phase == Phase::Decode ? 1 : n_}, at.first = steps(1, at.rows[0]);
    if (phase != Phase::Decode) at.key_rows.assign(size_t(g_), m_);
    at.mods.scale = in_.scale;
    at.store = &store_->layer(0), at.stores = store_.get();
    at.inputs = &inputs_, at.basis = &basis_;
    at.read.positions = positions_;
    return at;
  }

  void begin() {
    queue_.memory->finish(queue_.stream);
    begun_ = std::chrono::steady_clock::now();
  }
  /// What began ends, and the next part begins.
  void lap(const char* name) {
    const auto before = begun_;
    begin();
    output_.seconds[name] += std::chrono::duration<double>(begun_ - before).count();
  }

  const Mechanism& part(int p) const { return *composition_.parts()[size_t(p)].mechanism; }
  const Mechanism& enter(LayerView& at, int p) const {
    at.enter(states_[size_t(p)].get());
    return part(p);
  }

  ApplyOutput recur(int p) {
    require(composition_.parts().size() == 1, "apply", "a linear form stands alone");
    LayerView at = view(Phase::Prompt);
    at.q = {q_, q_offsets_, {}, h_, h_ * n_}, at.k = {k_, k_offsets_, {}, g_, g_ * m_},
    at.v = {v_, k_offsets_, {}, g_, g_ * m_};
    at.out = queue_.scratch.take(Dtype::F32, {h_ * n_, model_.d_v});
    begin();
    const Tensor state = enter(at, p).recur(at);
    lap("state");
    if (in_.beside_dense) {
      const Tensor lse = queue_.scratch.take(Dtype::F32, {h_ * n_}),
                   out = queue_.scratch.take(Dtype::F32, {h_ * n_, model_.d_v});
      begin();
      queue_.run->attend(queue_, at.q, at.k, at.v, {}, at.mods, out, lse);
      lap("dense");
    }
    add("out", Dtype::F32, {h_, n_, model_.d_v}, at.out);
    add("state", Dtype::F32, {h_, model_.d, model_.d_v}, state);
    return std::move(output_);
  }

  // The last query as a decoded token: its row of out and lse is what it reads from the store.
  void read(LayerView& prompt, int reader) {
    LayerView at = view(Phase::Decode);
    const Tensor offsets = compute(queue_, Dtype::I64, {h_ + 1}, pick(index() < h_, (index() + 1) * n_ - 1, h_ * n_));
    const Tensor ends = compute(queue_, Dtype::I64, {h_}, (index() + 1) * n_);
    at.q = {q_, offsets, ends, h_, h_ * n_};
    at.q_pos = at.mods.q_pos = q_pos_;
    begin();
    at.read.plan = limit_heads(at, enter(at, reader).read(at).plan, prompt.k, m_, part(reader).heads);
    at.out = prompt.out, at.lse = prompt.lse;
    queue_.run->attend_store(queue_, at.q, store_->layer(0).pages(), at.read, at.mods, at.out, at.lse);
    // Edits of other mechanisms are the prompt's, and done.
    if (has(composition_.parts()[size_t(reader)].roles, Role::Edit))
      compute(queue_, at.q, load(enter(at, reader).edit(at), index()), at.out);
    lap("read");
    std::vector<std::vector<int32_t>> tokens(static_cast<size_t>(h_));
    const Plan plan = host_(at.read.plan);
    const Ragged q = host_.segments(at.q), k = host_.segments(prompt.k);
    for (int64_t head = 0; head < h_; ++head) {
      auto& list = tokens[size_t(head)];
      each_interval(plan, q, k, Mods(), 0, head, [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) list.push_back(int32_t(j));
      });
      const double pairs = in_.causal ? double(n_) * double(m_ - n_) + double(n_) * double(n_ + 1) / 2
                                      : double(n_) * double(m_);
      density_[size_t(head)] -= double(m_ - int64_t(list.size())) / pairs;
    }
    add_lists("read", tokens);
  }

  void keep(LayerView& at, int keeper) {
    begin();
    const auto& policy = static_cast<const KeepPolicy&>(enter(at, keeper));
    if (!policy.settle(at)) {
      const Ragged scores = policy.score(at);
      const Tensor counts = policy.allocate(
          {queue_, model_, 0, std::span(&scores, 1), at.prompt, policy.kept(), at.state_held()});
      evict(at, policy, scores, counts.select(0, 0));
    }
    lap("keep");
    std::vector<std::vector<int32_t>> positions;
    for (int64_t head = 0; head < g_; ++head) positions.push_back(store_->layer(0).positions(head));
    add_lists("kept", positions);

    // What the last query would read from what is left.
    const Tensor out = queue_.scratch.take(Dtype::F32, {h_, model_.d_v}), lse = queue_.scratch.take(Dtype::F32, {h_});
    const Num row = place();
    const Tensor q = compute(queue_, Dtype::F32, {h_, model_.d}, load(q_, ((row + 1) * n_ - 1) * model_.d + channel()));
    const Tensor pos = compute(queue_, Dtype::I32, {h_}, position(m_ - 1)), offsets = steps(h_, 1);
    Read read;
    read.positions = positions_;
    Mods mods = at.mods;
    mods.q_pos = pos, mods.k_pos = {};
    queue_.run->attend_store(queue_, {q, offsets, {}, h_, h_}, store_->layer(0).pages(), read, mods, out, lse);
    if (basis_.v) turn(out, offsets, basis_.v_back, out);
    add("kept_out", Dtype::F32, {h_, model_.d_v}, out);
    add("kept_lse", Dtype::F32, {h_}, lse);
  }

  // Blocks that hold a key some query of the tile sees; plans of other forms are listed token by token.
  void export_plan(const LayerView& at) {
    const Plan plan = host_(at.plan);
    const Ragged q = host_.segments(at.q), k = host_.segments(at.k);
    const Mods mods = host_.positions(at.mods);
    const bool dense = plan.form == Plan::Form::Dense, blocks = dense || (plan.form == Plan::Form::Blocks && !plan.mask);
    const int64_t rows = blocks ? plan.q_tile : 1, cols = blocks ? plan.k_tile : 1;
    const PlanRows numbers(plan, q, g_);
    std::vector<std::vector<int32_t>> lists;
    for (int64_t head = 0; head < h_; ++head) {
      const size_t first = lists.size();
      for (int64_t t = 0; t * rows < n_; ++t) {
        auto& list = lists.emplace_back();
        if (!blocks) continue;
        const int64_t seen = in_.causal ? m_ - n_ + std::min((t + 1) * rows, n_) : m_;
        if (dense) {
          for (int64_t j = 0; j * cols < seen; ++j) list.push_back(int32_t(j));
          continue;
        }
        const int64_t row = numbers.row(0, head, h_, t * rows, plan.q_tile);
        for (int64_t e = plan.begin(row); e < plan.end(row); ++e)
          if (plan.index.at<int32_t>(e) * cols < seen) list.push_back(plan.index.at<int32_t>(e));
      }
      if (!blocks)
        each_interval(plan, q, k, mods, 0, head, [&](int64_t row, int64_t begin, int64_t end) {
          for (int64_t j = begin; j < end; ++j) lists[first + size_t(row)].push_back(int32_t(j));
        });
    }
    add_lists("plan", lists);
    Buffer block(Dtype::I32, {2});
    block->at<int32_t>(0) = int32_t(rows), block->at<int32_t>(1) = int32_t(cols);
    output_.arrays.emplace_back("plan_block", std::move(block));
  }

  void add(const std::string& name, Dtype type, std::initializer_list<int64_t> sizes, const Tensor& from) {
    Buffer copied(type, sizes);
    queue_.read_back(from, copied->data);
    output_.arrays.emplace_back(name, std::move(copied));
  }

  void add_lists(const std::string& name, const std::vector<std::vector<int32_t>>& lists) {
    Buffer offsets(Dtype::I64, {int64_t(lists.size()) + 1});
    std::vector<int32_t> index;
    offsets->at<int64_t>(0) = 0;
    for (size_t i = 0; i < lists.size(); ++i) {
      index.insert(index.end(), lists[i].begin(), lists[i].end());
      offsets->at<int64_t>(i + 1) = int64_t(index.size());
    }
    output_.arrays.emplace_back(name + "_offsets", std::move(offsets));
    output_.arrays.emplace_back(name + "_index", Buffer::of<int32_t>({int64_t(index.size())}, index));
  }

  const ApplyInput& in_;
  Queue queue_;
  OnHost host_;
  ModelInfo model_;
  Composition composition_;
  int64_t h_ = 0, n_ = 0, g_ = 0, m_ = 0;
  Tensor q_, k_, v_, q_offsets_, k_offsets_, q_pos_, k_pos_;  // in scratch, which is never rewound
  std::map<std::string, Tensor> inputs_;
  Basis basis_;
  std::vector<std::unique_ptr<State>> states_;
  std::unique_ptr<Store> store_;
  Read::Positions positions_ = Read::Positions::True;
  std::vector<double> density_;
  ApplyOutput output_;
  std::chrono::steady_clock::time_point begun_;
};

}  // namespace

const Buffer* ApplyOutput::find(const std::string& name) const {
  for (const auto& [key, buffer] : arrays)
    if (key == name) return &buffer;
  return nullptr;
}

std::vector<std::string> inputs_of(const Spec& spec, const ModelInfo& model) {
  std::vector<std::string> out = value_or_throw(make_mechanism(spec, registry()))->needs(model).inputs;
  const auto add = [&](const auto& self, const Spec& of) -> void {
    const Entry* entry = value_or_throw(find_entry(of.name, registry()));
    out.insert(out.end(), entry->apply_inputs.begin(), entry->apply_inputs.end());
    for (const Spec& inner : of.inner) self(self, inner);
  };
  add(add, spec);
  return out;
}

Result<ApplyOutput> apply(const std::string& spec, const ApplyInput& input) {
  try {
    return Harness(spec, input).run();
  } catch (const Error& error) { return tl::unexpected(error.failure()); } catch (const std::bad_alloc&) {
    return fail(Code::Memory, "apply", "not enough memory for tensors of this size");
  }
}

}  // namespace heed
