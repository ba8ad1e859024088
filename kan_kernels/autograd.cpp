/*
Gradients of the kernels for autograd, in C++: from Python a call costs 0.03 ms more forward and 0.03 ms backward, and
a step of a small GPT has eight of each.

A gradient has no gradient itself. Where one is asked for (create_graph), the backward's operators go through autograd,
and kan_kernels/__init__.py says there that it is too much.
*/
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Optional = std::optional<Tensor>;
using Below = at::AutoDispatchBelowADInplaceOrView;  // operators called in its life skip autograd

template <class Signature> auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// For a backward, whose operators are autograd's business only if a gradient of the gradient is wanted.
std::optional<Below> below_unless_wanted() {
  return at::GradMode::is_enabled() ? std::optional<Below>() : std::optional<Below>(std::in_place);
}

enum Kind { SPLINE, BFLOAT16, PAIRS };
constexpr const char* FORWARD[] = {"splinegpt_cpu::spline", "splinegpt_cpu::spline_bfloat16", "splinegpt_cpu::pairs"};
constexpr const char* BACKWARD[] = {"splinegpt_cpu::spline_backward", "splinegpt_cpu::spline_bfloat16_backward",
                                    "splinegpt_cpu::pairs_backward"};

// Of spline, which has a `rounded` beside x, table and width, and of the two that have not.
template <Kind kind, class... Rounded> struct Spline : torch::autograd::Function<Spline<kind, Rounded...>> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& table, double width, Rounded... rounded) {
    static const auto spline = find<Tensor(const Tensor&, const Tensor&, double, Rounded...)>(FORWARD[kind]);
    ctx->save_for_backward({x, table});
    ctx->saved_data["width"] = width;
    Below below;
    return spline.call(x, table, width, rounded...);
  }
  static variable_list backward(AutogradContext* ctx, variable_list g) {
    static const auto backward =
        find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, double)>(BACKWARD[kind]);
    const auto saved = ctx->get_saved_variables();
    const auto below = below_unless_wanted();
    auto [dx, dtable] = backward.call(g[0], saved[0], saved[1], ctx->saved_data["width"].toDouble());
    variable_list gradients = {dx, dtable.to(saved[1].scalar_type())};
    gradients.resize(3 + sizeof...(Rounded));
    return gradients;
  }
};

// Linear in p, so its gradient is one of the same kind, and has gradients itself.
struct ChangeBasis : torch::autograd::Function<ChangeBasis> {
  static Tensor call(const Tensor& matrix, const Tensor& p) {
    static const auto change_basis = find<Tensor(const Tensor&, const Tensor&)>("splinegpt_cpu::change_basis");
    return change_basis.call(matrix, p);
  }
  static Tensor forward(AutogradContext* ctx, const Tensor& matrix, const Tensor& p) {
    ctx->save_for_backward({matrix});
    Below below;
    return call(matrix, p);
  }
  static variable_list backward(AutogradContext* ctx, variable_list g) {
    const auto below = below_unless_wanted();
    return {Tensor(), call(ctx->get_saved_variables()[0].t(), g[0])};
  }
};

struct Attention : torch::autograd::Function<Attention> {
  static Tensor forward(AutogradContext* ctx, const Tensor& qkv, int64_t heads, const Optional& cos,
                        const Optional& sin, bool qk_norm, const Optional& gain) {
    static const auto attention =
        find<Tensor(const Tensor&, int64_t, const Optional&, const Optional&, bool, const Optional&)>(
            "splinegpt_cpu::attention");
    ctx->save_for_backward({qkv, cos.value_or(Tensor()), sin.value_or(Tensor()), gain.value_or(Tensor())});
    ctx->saved_data["heads"] = heads;
    ctx->saved_data["qk_norm"] = qk_norm;
    Below below;
    return attention.call(qkv, heads, cos, sin, qk_norm, gain);
  }
  static variable_list backward(AutogradContext* ctx, variable_list g) {
    static const auto backward =
        find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, int64_t, const Optional&, const Optional&, bool,
                                        const Optional&)>("splinegpt_cpu::attention_backward");
    const auto saved = ctx->get_saved_variables();
    const auto given = [&](int i) { return saved[i].defined() ? Optional(saved[i]) : std::nullopt; };
    const auto below = below_unless_wanted();
    auto [dqkv, dgain] = backward.call(g[0], saved[0], ctx->saved_data["heads"].toInt(), given(1), given(2),
                                       ctx->saved_data["qk_norm"].toBool(), given(3));
    return {dqkv, Tensor(), Tensor(), Tensor(), Tensor(), saved[3].defined() ? dgain : Tensor()};
  }
};

struct CrossEntropy : torch::autograd::Function<CrossEntropy> {
  static variable_list forward(AutogradContext* ctx, const Tensor& logits, const Tensor& targets) {
    static const auto cross_entropy =
        find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&)>("splinegpt_cpu::cross_entropy");
    Below below;
    auto [loss, lse] = cross_entropy.call(logits, targets);
    ctx->save_for_backward({logits, targets, lse});
    ctx->mark_non_differentiable({lse});
    return {loss, lse};
  }
  static variable_list backward(AutogradContext* ctx, variable_list g) {
    static const auto backward = find<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&)>(
        "splinegpt_cpu::cross_entropy_backward");
    const auto saved = ctx->get_saved_variables();
    const auto below = below_unless_wanted();
    return {backward.call(g[0], saved[0], saved[1], saved[2]), Tensor()};
  }
};

TORCH_LIBRARY_IMPL(splinegpt_cpu, Autograd, m) {
  m.impl("spline", [](const Tensor& x, const Tensor& table, double width, bool rounded) {
    return Spline<SPLINE, bool>::apply(x, table, width, rounded);
  });
  m.impl("spline_bfloat16", [](const Tensor& x, const Tensor& table, double width) {
    return Spline<BFLOAT16>::apply(x, table, width);
  });
  m.impl("pairs", [](const Tensor& x, const Tensor& table, double width) {
    return Spline<PAIRS>::apply(x, table, width);
  });
  m.impl("change_basis", [](const Tensor& matrix, const Tensor& p) {
    TORCH_CHECK(!matrix.requires_grad(), "change_basis: the matrix has no gradient; detach() it");
    return ChangeBasis::apply(matrix, p);
  });
  m.impl("attention", [](const Tensor& qkv, int64_t heads, const Optional& cos, const Optional& sin, bool qk_norm,
                         const Optional& gain) {
    TORCH_CHECK(!(cos && cos->requires_grad()) && !(sin && sin->requires_grad()),
                "attention: cos and sin have no gradients; detach() them");
    return Attention::apply(qkv, heads, cos, sin, qk_norm, gain);
  });
  m.impl("cross_entropy", [](const Tensor& logits, const Tensor& targets) {
    const auto both = CrossEntropy::apply(logits, targets);
    return std::make_tuple(both[0], both[1]);
  });
}

}  // namespace
