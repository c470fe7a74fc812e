// Arguments of the aggregation's kernels; laid out as neighbourhood attention, groups for heads.
#pragma once

#include "local_attention_plan.h"

namespace acmix_mm {

// Maps (B, G, C / G, rows, columns); weights (B, G, k k, output rows, output columns).
struct AggregationArgs {
  Map value, weight;
  Target out;
};

struct GradWeightArgs {
  Map grad, value;
  Target grad_weight;
};

struct GradValueArgs {
  Map grad, weight;
  Target grad_value;  // to add to, of the compute type
};

}  // namespace acmix_mm
