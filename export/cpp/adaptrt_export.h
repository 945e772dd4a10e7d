// Runs the programs that `CompiledUnroll.export` wrote: adapts a model to a few examples, and predicts, without Python.
//
//   adaptrt::Export program("folder");
//   adaptrt::Tensors adapted = program.run("adapt", {{"support.inputs", x}, {"support.target", y}});
//   adaptrt::Tensors predicted = program.run("predict", {{"query.0", q}}, adapted);
//
// Tensors go by the names of inputs and outputs in the manifest. The manifest and the hash of every file are checked before anything that
// holds code is opened. A program is code all the same: the digest shows damage, and not who wrote the folder. Take exports from sources that
// you trust, as you would a program.
//
// Needs C++20 and libtorch. An `Export` is safe to use from several threads.
//
// Known limits: CPU only. Noise is an input, since it is the caller's to draw. Nothing has a gradient.

#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>

#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "adaptrt_export/manifest.h"

namespace adaptrt {

namespace detail {

using Run = std::function<std::vector<at::Tensor>(std::vector<at::Tensor>)>;

inline std::string place_of_first(const at::Tensor& wrong) {
  const at::Tensor place = wrong.nonzero()[0];
  std::string found = "[";
  for (int64_t axis = 0; axis < place.numel(); ++axis) found += (axis > 0 ? ", " : "") + std::to_string(place[axis].item<int64_t>());
  return found + "]";
}

inline std::string number_at_first(const at::Tensor& value, const at::Tensor& wrong) {
  std::ostringstream found;
  const at::Tensor first = value.masked_select(wrong)[0];
  if (at::isFloatingType(value.scalar_type())) found << first.item<double>();
  else found << first.item<int64_t>();
  return found.str();
}

inline void require_all(const std::string& name, const at::Tensor& value, const at::Tensor& right, const std::string& wanted) {
  if (right.all().item<bool>()) return;
  const at::Tensor wrong = right.logical_not();
  throw Error("'" + name + "' holds " + number_at_first(value, wrong) + " at " + place_of_first(wrong) + "; " + wanted);
}

inline void check_bound(const Bound& bound, const std::string& name, const at::Tensor& value) {
  const at::Tensor wide = value.to(at::kLong);  // in a narrow dtype the size may wrap around
  at::Tensor exists = wide.ge(0).logical_and(wide.lt(bound.size));
  if (bound.ignore_index) exists = exists.logical_or(wide.eq(*bound.ignore_index));
  if (bound.part.defined()) exists = exists.logical_or(bound.part.logical_not());  // its axes are the last ones
  require_all(name, value, exists, bound.of + " are 0 to " + std::to_string(bound.size - 1));
}

// Noise may be used as an index, so it must be what it is said to be drawn from.
inline void check_noise(const Noise& noise, const std::string& name, const at::Tensor& value) {
  const auto& constants = noise.constants;
  const auto range = [&](double low, double high) { return value.ge(low).logical_and(value.le(high)); };
  if (noise.kind == "bernoulli") require_all(name, value, value.eq(0).logical_or(value.eq(1)), "draws of 'bernoulli' are 0 or 1");
  else if (noise.kind == "uniform") require_all(name, value, range(constants[0], constants[1]), "it is outside the range of 'uniform'");
  else if (noise.kind == "randint") require_all(name, value, range(constants[0], constants[1] - 1), "it is outside the range of 'randint'");
  else if (noise.kind == "randperm") require_all(name, value, range(0, constants[0] - 1), "it is outside the range of 'randperm'");
  else if (noise.kind == "exponential") require_all(name, value, value.ge(0).logical_and(at::isfinite(value)), "draws of 'exponential' are finite and not negative");
  else require_all(name, value, at::isfinite(value), "draws of '" + noise.kind + "' are finite");
}

// A program that has been opened, and what it needs beside the data.
struct Opened {
  Run run;
  std::vector<at::Tensor> base;  // for each input that is in the weights its value, in the layout in which the program takes it
};

}  // namespace detail

class Export {
 public:
  // Reads a folder.
  //   format: "pt2" or "torchscript"; empty for the first of these that all programs have.
  //   weights: another safetensors file than that of the folder; empty for that.
  // Throws Error if the folder is damaged, was written by a newer version, or lacks the format or the weights.
  explicit Export(fs::path folder, std::string format = "", const fs::path& weights = {}) : folder_(std::move(folder)), format_(std::move(format)) {
    std::string own;
    manifest_ = read_manifest(folder_, weights.empty() ? &own : nullptr);
    const auto there = [&](const std::string& name) {
      return !manifest_.programs.empty() &&
             std::all_of(manifest_.programs.begin(), manifest_.programs.end(), [&](const Program& each) { return each.files.contains(name); });
    };
    if (format_.empty()) format_ = there("pt2") ? "pt2" : "torchscript";
    if ((format_ != "pt2" && format_ != "torchscript") || !there(format_))
      throw Error(folder_.string() + " has no programs in the format '" + format_ + "' that this program runs; export with formats=\"pt2\" or \"torchscript\"");
    if (weights.empty() && !manifest_.files.contains(kWeights))
      throw Error(folder_.string() + " was exported with weights=False; give a safetensors file of weights");
    read_weights(weights.empty() ? folder_ / kWeights : weights, weights.empty() ? &own : nullptr);
    opened_.resize(manifest_.programs.size());
    if (format_ == "pt2") require_machine(manifest_);
  }

  const Manifest& manifest() const { return manifest_; }
  const std::string& format() const { return format_; }

  // Runs the program of a kind that was exported for data of these shapes.
  //   kind: "adapt", "adapt_predict", "predict" or "loss".
  //   data: all inputs of role "data" and "noise", by name.
  //   start: what "adapt" returned, to go on from that; empty for the exported weights.
  // Returns all outputs by name. Throws Error if an input is missing, unknown, or not as the program needs it.
  Tensors run(const std::string& kind, const Tensors& data, const Tensors& start = {}) {
    at::NoGradGuard no_grad;
    const size_t number = find(kind, data);
    const Program& program = manifest_.programs[number];
    for (const auto& [name, value] : data) require_known(program, name);
    const std::map<std::string, at::Tensor> state = state_of(start);
    const detail::Opened& opened = open(number);
    std::vector<at::Tensor> values = opened.base;
    for (size_t place = 0; place < values.size(); ++place) {
      const Entry& entry = program.inputs[place];
      if (!entry.weight) {
        const auto own = data.find(entry.name);
        if (own == data.end()) throw Error("'" + entry.name + "' is missing, " + in_words(entry.spec) + (entry.role == "noise" ? ": noise, which is the caller's to draw" : ""));
        values[place] = as_taken(entry, own->second);
      } else if (!start.empty() && manifest_.state.contains(*entry.weight)) {
        values[place] = as_taken(entry, state.at(*entry.weight));
      }
    }
    check(program, values);
    std::vector<at::Tensor> results = opened.run(std::move(values));
    if (results.size() != program.outputs.size()) throw Error("program '" + program.name + "' has returned another number of tensors than it should");
    Tensors found;
    for (size_t place = 0; place < results.size(); ++place) {
      const Entry& entry = program.outputs[place];
      if (spec_of(results[place]) != entry.spec) throw Error("program '" + program.name + "' has returned " + in_words(spec_of(results[place])) + " for '" + entry.name + "'");
      found[entry.name] = std::move(results[place]);
    }
    return found;
  }

  // The program that `run` calls for such data. Throws Error if there is none.
  const Program& program_for(const std::string& kind, const Tensors& data) const { return manifest_.programs[find(kind, data)]; }

 private:
  void read_weights(const fs::path& path, const std::string* content) {
    if (content == nullptr) {
      weights_ = read_safetensors(path);
    } else {
      try {
        weights_ = parse_safetensors(*content);
      } catch (const Error& error) {
        throw Error(path.string() + " is no safetensors file: " + error.what());
      }
    }
    size_t count = 0;
    for (const auto* part : {&manifest_.state, &manifest_.fixed, &manifest_.constants}) {
      for (const auto& [name, spec] : *part) {
        const auto found = weights_.find(name);
        if (found == weights_.end()) throw Error(path.string() + " does not have the weight '" + name + "'");
        if (spec_of(found->second) != spec) throw Error(path.string() + " has " + in_words(spec_of(found->second)) + " for '" + name + "', which must be " + in_words(spec));
        ++count;
      }
    }
    if (count != weights_.size()) throw Error(path.string() + " has weights that the programs do not take");
  }

  size_t find(const std::string& kind, const Tensors& data) const {
    std::string known, unfit;
    for (size_t number = 0; number < manifest_.programs.size(); ++number) {
      const Program& program = manifest_.programs[number];
      if (program.kind != kind) continue;
      bool fits = true;
      std::string words;
      for (const size_t place : program.data) {
        const Entry& entry = program.inputs[place];
        words += (words.empty() ? "" : ", ") + entry.name + " " + in_words(entry.spec);
        const auto own = data.find(entry.name);
        const bool there = own != data.end() && own->second.defined();
        if (there && spec_of(own->second) == entry.spec) continue;
        fits = false;
        if (unfit.empty()) unfit = there ? "whose '" + entry.name + "' is " + in_words(spec_of(own->second)) : "which lacks '" + entry.name + "'";
      }
      if (fits) return number;
      known += (known.empty() ? "" : "; or ") + words;
    }
    if (known.empty()) throw Error("no program '" + kind + "' was exported");
    throw Error("no program '" + kind + "' was exported for this data, " + unfit + ", only for " + known);
  }

  static void require_known(const Program& program, const std::string& name) {
    std::string known;
    for (const Entry& entry : program.inputs) {
      if (entry.weight) continue;
      if (entry.name == name) return;
      known += (known.empty() ? "" : ", ") + entry.name;
    }
    throw Error("'" + name + "' is no input of program '" + program.name + "', which takes " + known);
  }

  // Returns the parts of the state, by name in the weights, that a result of "adapt" holds.
  std::map<std::string, at::Tensor> state_of(const Tensors& start) const {
    std::map<std::string, at::Tensor> found;
    if (start.empty()) return found;
    for (const Program& program : manifest_.programs) {
      if (program.kind != "adapt") continue;
      for (const Entry& entry : program.outputs) {
        const auto own = start.find(entry.name);
        if (entry.weight && own != start.end()) found.insert_or_assign(*entry.weight, own->second);
      }
    }
    for (const auto& [name, spec] : manifest_.state)
      if (!found.contains(name)) throw Error("the start must be all that 'adapt' returned, and lacks '" + name + "'");
    return found;
  }

  // Returns the tensor in the memory layout in which the program takes it. A program itself would notice no other shape, dtype or layout.
  static at::Tensor as_taken(const Entry& entry, const at::Tensor& value) {
    if (!value.defined() || value.layout() != at::kStrided || !value.device().is_cpu()) throw Error("'" + entry.name + "' must be a dense tensor on the CPU");
    if (spec_of(value) != entry.spec) throw Error("'" + entry.name + "' must be " + in_words(entry.spec) + ", got " + in_words(spec_of(value)));
    const at::Tensor own = value.detach().resolve_neg();
    if (own.strides() == at::IntArrayRef(entry.strides)) return own;
    at::Tensor copy = at::empty_strided(entry.spec.shape, entry.strides, at::dtype(entry.spec.dtype));
    copy.copy_(own);
    return copy;
  }

  void check(const Program& program, const std::vector<at::Tensor>& values) const {
    if (program.weights_of_examples) {
      const std::string& name = program.inputs[*program.weights_of_examples].name;
      const at::Tensor& value = values[*program.weights_of_examples];
      detail::require_all(name, value, value.ge(0), "weights must be at least 0");
      const at::Tensor totals = value.sum(-1);
      detail::require_all(name + "', summed over examples, '", totals, totals.gt(0), "there is padding alone, which has no loss");
    }
    for (const Bound& bound : program.bounds) {
      const size_t place = program.data[static_cast<size_t>(bound.position)];
      detail::check_bound(bound, program.inputs[place].name, values[place]);
    }
    if (manifest_.check_finite)
      for (const size_t place : program.data)
        if (at::isFloatingType(values[place].scalar_type()))
          detail::require_all(program.inputs[place].name, values[place], at::isfinite(values[place]), "the data must be finite");
    for (size_t number = 0; number < program.noise.size(); ++number) {
      const size_t place = program.noise[number];
      detail::check_noise(program.draws[number], program.inputs[place].name, values[place]);
    }
  }

  const detail::Opened& open(size_t number) {
    const std::lock_guard<std::mutex> guard(lock_);
    if (opened_[number]) return *opened_[number];
    const Program& program = manifest_.programs[number];
    auto made = std::make_unique<detail::Opened>();
    for (const Entry& entry : program.inputs) {
      at::Tensor value;
      if (entry.weight) {
        value = weights_.at(*entry.weight);
        if (value.dim() < static_cast<int64_t>(entry.spec.shape.size())) value = value.expand(entry.spec.shape);  // over the task axis
        value = as_taken(entry, value);
      }
      made->base.push_back(std::move(value));
    }
    const std::string& name = program.files.at(format_);
    if (format_ == "pt2") {
      const FileEntry& wanted = manifest_.files.at(name);
      if (File(folder_ / name, false).identity() != wanted.checked) check_file(folder_, name, wanted);  // it has been changed since
      auto loader = std::make_shared<torch::inductor::AOTIModelPackageLoader>((folder_ / name).string(), "program-" + program.name + "-");
      made->run = [loader](std::vector<at::Tensor> values) { return loader->boxed_run(std::move(values)); };
    } else {
      std::string content;
      check_file(folder_, name, manifest_.files.at(name), &content);
      std::istringstream stream(std::move(content));
      auto module = std::make_shared<torch::jit::Module>(torch::jit::load(stream));
      module->eval();
      made->run = [module](const std::vector<at::Tensor>& values) {
        const auto result = module->forward(std::vector<c10::IValue>(values.begin(), values.end()));
        if (!result.isTuple()) throw Error("a TorchScript program must return a tuple of tensors");
        std::vector<at::Tensor> found;
        for (const c10::IValue& each : result.toTupleRef().elements()) found.push_back(each.toTensor());
        return found;
      };
    }
    opened_[number] = std::move(made);
    return *opened_[number];
  }

  fs::path folder_;
  std::string format_;
  Manifest manifest_;
  Tensors weights_;
  std::mutex lock_;
  std::vector<std::unique_ptr<detail::Opened>> opened_;  // by number of the program; null until it is called first
};

}  // namespace adaptrt
