#include "nm/choice.hpp"

#include "common/rounding.hpp"

namespace sparsecomp {
namespace {

// What it takes to transpose a step of a batch column, and its part of y, in multiply-adds with a memory operand.
constexpr double kPacking = 11;
constexpr int64_t kRows = 4;  // that a micro-kernel of a panel takes at most
// Pairs of a permute and a multiply-add for a slot of a tile, which is two registers, and a column, and what loads and
// shifts weights and positions between them.
constexpr double kPairs = 2.15;

// By the table of the set.
bool pay_by_size(const PanelSet& kernels, int64_t out, int64_t batch, int threads) {
  if (out < kernels.least_rows || out * batch < kernels.least_outputs * threads) return false;
  const int64_t padded = round_up(batch, kernels.unit);
  return batch >= kernels.least_batch && static_cast<double>(batch) * kernels.speedup >= static_cast<double>(padded);
}

}  // namespace

double permute_nanoseconds(const Geometry& g, int64_t batch, const Rates& rates) {
  const double rate = g.m <= 4 ? rates.near : g.m == 8 ? rates.far : rates.wide;
  return static_cast<double>(g.tiles * g.slots * batch) * kPairs / rate;
}

double panel_nanoseconds(const PanelSet& kernels, const Geometry& g, int64_t batch, const Rates& rates) {
  const int64_t units = divide_up(batch, kernels.unit), panels = divide_up(units, kernels.most_units);
  const int64_t wide = units % panels, least = units / panels;  // as many panels have one unit more than the others
  double cost = static_cast<double>(panels - wide) * kernels.cost[least];
  if (wide > 0) cost += static_cast<double>(wide) * kernels.cost[least + 1];
  const auto weights = static_cast<double>(round_up(g.out, kRows) * g.slots);
  return (weights * cost + static_cast<double>(units * kernels.unit) * kPacking) / rates.multiply;
}

bool panels_pay(const PanelSet& kernels, const Geometry& g, int64_t batch, int threads, const Rates& rates) {
  if (kernels.cost[kernels.most_units] == 0) return pay_by_size(kernels, g.out, batch, threads);
  return panel_nanoseconds(kernels, g, batch, rates) < permute_nanoseconds(g, batch, rates);
}

}  // namespace sparsecomp
