// checks_cross_entropy.cpp: the arguments of cross_entropy, targets included, before any store.

#include "checker.h"

namespace deltaops {
namespace {

// What both directions take. Args: either of the two structs; `forward` writes the state.
template <class Args>
void common(Checker *c, const Args &args, bool forward) {
  const int64_t M = args.logits.rows, V = args.logits.cols;
  c->expect(args.reduction == DELTAOPS_SUM || args.reduction == DELTAOPS_MEAN,
            "reduction must be 0 (sum) or 1 (mean), got %d.", args.reduction);
  c->expect(args.reserved == 0, "reserved must be 0, got %d. Zero the struct first.",
            args.reserved);
  c->rows_of("logits", args.logits, "[M, V]", M, V, -1);
  if (forward)
    c->output("state", args.state, "[M, 2]", M, 2, DELTAOPS_F32);
  else
    c->rows_of("state", args.state, "[M, 2]", M, 2, DELTAOPS_F32);
  c->dense("state", args.state, M, 2);
  c->work(M, 0, V, 0);
  if (M > 0) c->array("target", args.target, M, false);
  for (int64_t m = 0; m < M && c->status() == DELTAOPS_OK; ++m) {
    const int64_t target = args.target[m];
    c->expect((target >= 0 && target < V) || target == args.ignore_index,
              "target[%" PRId64 "] must be a class from 0 to %" PRId64 " or ignore_index=%" PRId64
              ", got %" PRId64 ". Are labels and logits of the same vocabulary?",
              m, V - 1, args.ignore_index, target);
  }
}

}  // namespace

deltaops_status check(const CrossEntropyForwardArgs *args) {
  Checker c("cross_entropy");
  if (!c.header(args)) return c.status();
  common(&c, *args, true);
  c.array("loss", args->loss, 1, true);
  return c.disjoint();
}

deltaops_status check(const CrossEntropyBackwardArgs *args) {
  Checker c("cross_entropy_backward");
  if (!c.header(args)) return c.status();
  common(&c, *args, false);
  c.array("grad_loss", args->grad_loss, 1, false);
  c.output("grad_logits", args->grad_logits, "[M, V]", args->logits.rows, args->logits.cols,
           args->logits.dtype);
  return c.disjoint();
}

}  // namespace deltaops
