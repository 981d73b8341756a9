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
  return most;
}

}  // namespace

int bench_kernels(const std::string& prefix, const std::string& name, int count, const std::string& format) {
  set_threads(count);
  // By itself it shows the processor: every instruction set, beside its own limits.
  const std::vector<const Kernels*> tables = name == "auto" || name == "cpu" ? cpu_kernels() : std::vector{&backend(name)};
  const bool device = tables.front()->memory->device != Device::Cpu;
  Progress progress("bench kernels");
  progress.at(0, "machine limits");
  const MachineLimits limits = device ? MachineLimits() : machine_limits();
  const DeviceLimits of_device = device ? device_limits(*tables.front()) : DeviceLimits();
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
      const double seconds = time_kernel(c, *table), rate = c.work / seconds * 1e-9;
      const double most = device ? (c.compute ? of_device.product_gflops : of_device.copy_gb_s)
                                 : (c.compute ? limit(limits, *table, c) : limits.read_gb_s);
      rows.push_back({{"kernel", c.kernel},
                      {"isa", table->name},
                      {"shape", c.shape},
                      {"seconds", seconds},
                      {"rate", rate},
                      {"unit", c.compute ? "GFLOP/s" : "GB/s"},
                      {"limit", most},
                      {"share", most > 0 ? rate / most : 0.0}});
    }
  }
  progress.clear();
  require(any, "bench kernels", "no kernel's name begins with '" + prefix + "'", "leave --kernel out to see all");

  Json peaks = Json::object();
  for (const auto& peak : limits.peaks) peaks[peak.name] = peak.gflops;
  if (format == "json") {
    Json all = {
        {"cpu", cpu_name()}, {"threads", threads()}, {"read_gb_s", limits.read_gb_s}, {"peak_gflops", peaks}, {"kernels", rows}};
    if (device)
      all = {{"gpu", cuda_state()},
             {"copy_gb_s", of_device.copy_gb_s},
             {"product_gflops", of_device.product_gflops},
             {"kernels", rows}};
    print(all);
  } else if (format == "csv") {
    std::cout << "kernel,isa,shape,seconds,rate,unit,limit\n";
    for (const Json& r : rows)
      std::cout << r["kernel"].get<std::string>() << ',' << r["isa"].get<std::string>() << ",\""
                << r["shape"].get<std::string>() << "\"," << r["seconds"] << ',' << r["rate"] << ','
                << r["unit"].get<std::string>() << ',' << r["limit"] << '\n';
  } else {
    if (device)
      std::cout << cuda_state() << ": copies " << fixed(of_device.copy_gb_s, 0)
                << " GB/s, read and written; product of bf16 " << fixed(of_device.product_gflops * 1e-3, 0) << " TFLOP/s";
    else std::cout << cpu_name() << ", " << threads() << " threads: reads " << fixed(limits.read_gb_s, 1) << " GB/s";
    for (const auto& peak : limits.peaks) std::cout << "; " << peak.name << ' ' << fixed(peak.gflops, 0) << " GFLOP/s";
    std::cout << "\nRates in GB/s stand against memory; what fits in a cache may pass it.\n\n";
    std::vector<std::vector<std::string>> cells;
    for (const Json& r : rows)
      cells.push_back({r["kernel"], r["isa"], r["shape"], fixed(r["rate"], 1) + " " + r["unit"].get<std::string>(),
                       fixed(100 * r["share"].get<double>(), 0) + " %", fixed(1e3 * r["seconds"].get<double>(), 3)});
    std::cout << table({"<kernel", "<isa", "<shape", "rate", "of limit", "ms"}, cells);
  }
  if (!interrupted()) return 0;
  std::cerr << "heed: interrupted; " << rows.size() << " measurements were finished\n";
  return 130;
}

}  // namespace heed::apps
