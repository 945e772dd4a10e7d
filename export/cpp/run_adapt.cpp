// Runs a program of an export on data in a safetensors file, and writes its outputs into another. README.md says how.

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <iostream>
#include <string>
#include <vector>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "adaptrt_export.h"

namespace {

constexpr const char* kUsage =
    "usage: run_adapt FOLDER adapt|adapt_predict|predict|loss DATA.safetensors OUT.safetensors"
    " [--format pt2|torchscript] [--weights FILE] [--start FILE] [--repeat N]";

struct Arguments {
  std::string folder, kind, data, out, format, weights, start;
  int repeat = 0;
};

Arguments parse(const std::vector<std::string>& given) {
  Arguments found;
  std::vector<std::string> places;
  for (size_t at = 0; at < given.size(); ++at) {
    if (!given[at].starts_with("--")) {
      places.push_back(given[at]);
      continue;
    }
    if (at + 1 == given.size() || given[at + 1].empty()) throw adaptrt::Error(kUsage);
    const std::string &option = given[at], &value = given[++at];
    if (option == "--format") found.format = value;
    else if (option == "--weights") found.weights = value;
    else if (option == "--start") found.start = value;
    else if (option == "--repeat") {
      const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), found.repeat);
      if (error != std::errc() || end != value.data() + value.size() || found.repeat < 0 || found.repeat > 10'000'000)
        throw adaptrt::Error("--repeat must be a whole number from 0 to 10000000, got '" + value + "'");
    } else throw adaptrt::Error("there is no option '" + option + "'; " + kUsage);
  }
  if (places.size() != 4) throw adaptrt::Error(kUsage);
  found.folder = places[0], found.kind = places[1], found.data = places[2], found.out = places[3];
  return found;
}

using Clock = std::chrono::steady_clock;

double ms_since(Clock::time_point begin) { return std::chrono::duration<double, std::milli>(Clock::now() - begin).count(); }

// The losses before each step are what "adapt" and "adapt_predict" return last, and the loss is all that "loss" does.
void print_losses(const adaptrt::Program& program, const adaptrt::Tensors& results) {
  if (program.kind == "predict" || program.outputs.empty()) return;
  const at::Tensor losses = results.at(program.outputs.back().name).to(at::kDouble).reshape({-1});
  std::cout << (program.kind == "loss" ? "loss" : "losses");
  for (int64_t place = 0; place < losses.numel(); ++place) std::cout << ' ' << losses[place].item<double>();
  std::cout << '\n';
}

void run(const Arguments& arguments) {
  const auto data = adaptrt::read_safetensors(arguments.data);
  const auto start = arguments.start.empty() ? adaptrt::Tensors() : adaptrt::read_safetensors(arguments.start);
  const auto begin = Clock::now();
  adaptrt::Export program(arguments.folder, arguments.format, arguments.weights);
  const adaptrt::Tensors results = program.run(arguments.kind, data, start);
  const double first_ms = ms_since(begin);
  adaptrt::write_safetensors(arguments.out, results);
  print_losses(program.program_for(arguments.kind, data), results);
  std::cout << "load to first result " << first_ms << " ms\n";
  if (arguments.repeat == 0) return;
  std::vector<double> times_ms;
  for (int count = 0; count < arguments.repeat; ++count) {
    const auto one = Clock::now();
    program.run(arguments.kind, data, start);
    times_ms.push_back(ms_since(one));
  }
  std::sort(times_ms.begin(), times_ms.end());
  std::cout << "median " << times_ms[times_ms.size() / 2] << " ms of " << arguments.repeat << '\n';
}

// Says what is wrong in one line. What PyTorch says further below is where in its source it noticed.
int fail(std::string message) {
  message = message.substr(0, message.find('\n'));
  for (char& each : message)
    if (static_cast<unsigned char>(each) < 0x20 || each == 0x7F) each = '?';
  std::fprintf(stderr, "run_adapt: %s\n", message.c_str());
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
#ifdef __GLIBC__
  // Otherwise the memory of a call's largest tensors goes back to the system after each call, and every page of it is made anew.
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
#endif
  try {
    run(parse(std::vector<std::string>(argv + 1, argv + argc)));
    return 0;
  } catch (const c10::Error& error) {
    return fail(error.what_without_backtrace());
  } catch (const std::exception& error) {
    return fail(error.what());
  } catch (...) {
    return fail("something went wrong that does not say what");
  }
}
