#include "apps/bench_kernels.h"

#include <algorithm>
#include <iostream>

#include "base/threads.h"
#include "lab/kernel_bench.h"
#include "lab/machine.h"
#include "lab/progress.h"

namespace heed::apps {
namespace {

/// The arithmetic limit that a kernel of this table stands against: the fastest of what it may multiply.
double limit(const MachineLimits& limits, const Kernels& table, const KernelCase& c) {
  if (table.name == "neon") return limits.peak("neon f32");
  const std::string vectors = table.name.starts_with("avx2") ? "avx2 " : "avx512 ";
  double most = limits.peak(vectors + "f32");
  if (!c.bf16 || !table.rounds) return most;
  most = std::max(most, limits.peak(vectors + "bf16"));
  return c.kernel == "matmul" ? std::max(most, limits.peak(vectors + "int16")) : most;
}

/// What no kernel passes: of the processor, or of a device.
struct Limits {
  explicit Limits(const Kernels& table) : on_device(table.memory->device != Device::Cpu) {
    if (on_device) device = device_limits(table);
    else machine = machine_limits();
  }
  double of(const Kernels& table, const KernelCase& c) const {
    if (on_device) return c.compute ? device.product_gflops : device.copy_gb_s;
    return c.compute ? limit(machine, table, c) : machine.read_gb_s;
  }
  bool on_device;
  MachineLimits machine;
  DeviceLimits device;
};

Json measured(const Kernels& table, const KernelCase& c, const Limits& limits) {
  const double seconds = time_kernel(c, table), rate = c.work / seconds * 1e-9, most = limits.of(table, c);
  return {{"kernel", c.kernel}, {"isa", table.name},
          {"shape", c.shape},   {"seconds", seconds},
          {"rate", rate},       {"unit", c.compute ? "GFLOP/s" : "GB/s"},
          {"limit", most},      {"share", most > 0 ? rate / most : 0.0}};
}

void show_json(const Limits& limits, const Json& rows) {
  if (limits.on_device)
    return print({{"gpu", cuda_state()},
                  {"copy_gb_s", limits.device.copy_gb_s},
                  {"product_gflops", limits.device.product_gflops},
                  {"kernels", rows}});
  Json peaks = Json::object();
  for (const auto& peak : limits.machine.peaks) peaks[peak.name] = peak.gflops;
  print({{"cpu", cpu_name()},
         {"threads", threads()},
         {"read_gb_s", limits.machine.read_gb_s},
         {"peak_gflops", peaks},
         {"kernels", rows}});
}

void show_csv(const Json& rows) {
  std::cout << "kernel,isa,shape,seconds,rate,unit,limit\n";
  for (const Json& r : rows)
    std::cout << r["kernel"].get<std::string>() << ',' << r["isa"].get<std::string>() << ",\""
              << r["shape"].get<std::string>() << "\"," << r["seconds"] << ',' << r["rate"] << ','
              << r["unit"].get<std::string>() << ',' << r["limit"] << '\n';
}

void show_table(const Limits& limits, const Json& rows) {
  if (limits.on_device)
    std::cout << cuda_state() << ": copies " << fixed(limits.device.copy_gb_s, 0)
              << " GB/s, read and written; product of bf16 " << fixed(limits.device.product_gflops * 1e-3, 0) << " TFLOP/s";
  else
    std::cout << cpu_name() << ", " << threads() << " threads: reads " << fixed(limits.machine.read_gb_s, 1) << " GB/s";
  for (const auto& peak : limits.machine.peaks)
    std::cout << "; " << peak.name << ' ' << fixed(peak.gflops, 0) << " GFLOP/s";
  std::cout << "\nRates in GB/s stand against memory; what fits in a cache may pass it.\n\n";
  std::vector<std::vector<std::string>> cells;
  for (const Json& r : rows)
    cells.push_back({r["kernel"], r["isa"], r["shape"], fixed(r["rate"], 1) + " " + r["unit"].get<std::string>(),
                     fixed(100 * r["share"].get<double>(), 0) + " %", fixed(1e3 * r["seconds"].get<double>(), 3)});
  std::cout << table({"<kernel", "<isa", "<shape", "rate", "of limit", "ms"}, cells);
}

}  // namespace

int bench_kernels(const std::string& prefix, const std::string& name, int count, const std::string& format) {
  set_threads(count);
  // By itself it shows the processor: every instruction set, beside its own limits.
  const std::vector<const Kernels*> tables = name == "auto" || name == "cpu" ? cpu_kernels() : std::vector{&backend(name)};
  Progress progress("bench kernels");
  progress.at(0, "machine limits");
  const Limits limits(*tables.front());
  Json rows = Json::array();
  bool any = false;
  for (size_t t = 0; t < tables.size(); ++t) {
    const Kernels* table = tables[t];
    const bool like_next = t + 1 < tables.size() && same_but_products(*table, *tables[t + 1]);
    for (const KernelCase& c : kernel_cases(*table, prefix)) {
      if (like_next && c.kernel != "matmul") continue;
      any = true;
      if (interrupted()) break;
      progress.at(0.5, table->name + " " + c.kernel);
      rows.push_back(measured(*table, c, limits));
    }
  }
  progress.clear();
  require(any, "bench kernels", "no kernel's name begins with '" + prefix + "'", "leave --kernel out to see all");
  if (format == "json") show_json(limits, rows);
  else if (format == "csv") show_csv(rows);
  else show_table(limits, rows);
  if (!interrupted()) return 0;
  std::cerr << "heed: interrupted; " << rows.size() << " measurements were finished\n";
  return 130;
}

}  // namespace heed::apps
