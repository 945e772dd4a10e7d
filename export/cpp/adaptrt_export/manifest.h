// The manifest of an export, as docs/manifest.schema.json describes it, and what is compared with it before anything else is opened.

#pragma once

#include <ATen/Version.h>
#include <ATen/cpu/Utils.h>
#include <sys/utsname.h>
#include <torch/version.h>

#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "files.h"
#include "json.h"
#include "safetensors.h"

namespace adaptrt {

inline constexpr int64_t kFormatVersion = 1;
inline constexpr uint64_t kMaxManifestBytes = uint64_t{1} << 26;
inline const std::string kManifest = "manifest.json";
inline const std::string kWeights = "weights.safetensors";

struct Spec {
  std::vector<int64_t> shape;
  at::ScalarType dtype;

  bool operator==(const Spec&) const = default;
};

// Writes a spec as "float32[5, 3]".
inline std::string in_words(const Spec& spec) {
  const auto dtype = std::find_if(std::begin(kDtypes), std::end(kDtypes), [&](const Dtype& each) { return each.type == spec.dtype; });
  std::string found = dtype == std::end(kDtypes) ? c10::toString(spec.dtype) : dtype->name;
  found += '[';
  for (size_t axis = 0; axis < spec.shape.size(); ++axis) found += (axis > 0 ? ", " : "") + std::to_string(spec.shape[axis]);
  return found + ']';
}

inline Spec spec_of(const at::Tensor& value) { return {value.sizes().vec(), value.scalar_type()}; }

// An input or output of a program.
struct Entry {
  std::string name, role;
  Spec spec;
  std::vector<int64_t> strides;
  std::optional<std::string> weight;  // name in the weights of its value; of an output that of the part of the state that it is
};

// States that integers of data are from 0 to size - 1, or ignore_index.
struct Bound {
  int64_t position, size;  // position: of the input, counted among those of role "data"
  std::optional<int64_t> ignore_index;
  std::string of;
  at::Tensor part;  // true where the bound holds, undefined for everywhere
};

struct Noise {
  std::string kind;
  std::vector<double> constants;
};

struct Program {
  std::string name, kind;
  std::vector<Entry> inputs, outputs;
  std::vector<size_t> data, noise;           // places among the inputs
  std::vector<Noise> draws;                  // for each of `noise`
  std::vector<Bound> bounds;
  std::optional<size_t> weights_of_examples;  // place among the inputs
  std::map<std::string, std::string> files;   // by format
};

struct FileEntry {
  std::string sha256;
  uint64_t bytes;
  File::Identity checked{};  // of the file whose hash was compared
};

struct Machine {
  std::string architecture, system, device;
  std::vector<std::string> instruction_sets;
};

struct Manifest {
  std::string torch;
  Machine machine;
  int64_t k = 0;
  bool per_step = false, weighted = false, check_finite = true;
  std::optional<int64_t> num_tasks;
  std::map<std::string, Spec> state, fixed, constants;
  std::vector<Program> programs;
  std::map<std::string, FileEntry> files;
};

namespace detail {

// Whether `name` is the name of a file in the folder: [A-Za-z0-9_][A-Za-z0-9._-]{0,200}, and not the manifest.
inline bool is_file_name(const std::string& name) {
  const auto is_word = [](char each) { return (each >= 'A' && each <= 'Z') || (each >= 'a' && each <= 'z') || (each >= '0' && each <= '9') || each == '_'; };
  return !name.empty() && name.size() <= 201 && name != kManifest && is_word(name[0]) &&
         std::all_of(name.begin(), name.end(), [&](char each) { return is_word(each) || each == '.' || each == '-'; });
}

// Takes a manifest apart, and refuses whatever has another form than it must have.
class Reading {
 public:
  Manifest manifest(const json::Object& fields) {
    require_keys("the manifest", fields,
                 {"format", "format_version", "made_by", "machine", "k", "per_step", "weighted", "num_tasks", "check_finite", "optimizer", "state",
                  "fixed", "constants", "opt_state", "state_dict", "fingerprint", "programs", "files"});
    Manifest found;
    found.torch = text("made_by.torch", at("made_by", object("made_by", fields.at("made_by")), "torch"));
    const json::Object& machine = object("machine", fields.at("machine"));
    found.machine.architecture = text("architecture", at("machine", machine, "architecture"));
    found.machine.system = text("system", at("machine", machine, "system"));
    found.machine.device = text("device", at("machine", machine, "device"));
    for (const json::Value& each : array("instruction_sets", at("machine", machine, "instruction_sets")))
      found.machine.instruction_sets.push_back(text("instruction_sets", each));
    found.k = count("k", fields.at("k"), 1);
    found.per_step = flag("per_step", fields.at("per_step"));
    found.weighted = flag("weighted", fields.at("weighted"));
    found.check_finite = flag("check_finite", fields.at("check_finite"));
    if (!fields.at("num_tasks").is_null()) found.num_tasks = count("num_tasks", fields.at("num_tasks"), 1);
    found.state = specs("state", fields.at("state"));
    found.fixed = specs("fixed", fields.at("fixed"));
    found.constants = specs("constants", fields.at("constants"));
    for (const auto& [name, entry] : object("files", fields.at("files"))) {
      const json::Object& own = object("files", entry);
      require_keys("file '" + name + "'", own, {"sha256", "bytes"});
      found.files[file(name)] = {text("sha256", own.at("sha256")), static_cast<uint64_t>(count("bytes", own.at("bytes"), 0))};
    }
    std::set<std::string> names;
    for (const json::Value& each : array("programs", fields.at("programs"))) {
      found.programs.push_back(program(found, object("programs", each)));
      if (!names.insert(found.programs.back().name).second) refuse("two programs have the name '" + found.programs.back().name + "'");
    }
    return found;
  }

 private:
  [[noreturn]] static void refuse(const std::string& reason) { throw Error("it is not of the form of a manifest: " + reason); }

  static Program program(const Manifest& manifest, const json::Object& fields) {
    require_keys("a program", fields, {"name", "kind", "inputs", "outputs", "data", "result", "noise", "bounds", "files"});
    Program found;
    found.name = text("name", fields.at("name"));
    found.kind = text("kind", fields.at("kind"));
    if (found.kind != "adapt" && found.kind != "adapt_predict" && found.kind != "predict" && found.kind != "loss")
      refuse("there is no kind '" + found.kind + "' of programs");
    const std::string of = "program '" + found.name + "'";
    found.inputs = entries(of, fields.at("inputs"));
    found.outputs = entries(of, fields.at("outputs"));
    for (size_t place = 0; place < found.inputs.size(); ++place) {
      const Entry& own = found.inputs[place];
      if (own.role == "data") found.data.push_back(place);
      else if (own.role == "noise") found.noise.push_back(place);
      else if (!own.weight || !has_weight(manifest, own)) refuse("input '" + own.name + "' of " + of + " is not among the weights");
      if ((own.role == "data" || own.role == "noise") && own.weight) refuse("input '" + own.name + "' of " + of + " is in the weights");
    }
    size_t leaves = 0;
    const json::Array& trees = array("data", fields.at("data"));
    for (const json::Value& tree : trees) {
      leaves += num_leaves(tree, 0);
      if (&tree == trees.data() && found.kind != "predict") found.weights_of_examples = weights_of_examples(manifest, found, tree, leaves);
    }
    if (leaves != found.data.size()) refuse(of + " has " + std::to_string(found.data.size()) + " inputs of data, and trees of " + std::to_string(leaves));
    for (const json::Value& each : array("noise", fields.at("noise"))) found.draws.push_back(noise(object("noise", each)));
    if (found.draws.size() != found.noise.size()) refuse("the noise of " + of + " is not that of its inputs");
    for (const json::Value& each : array("bounds", fields.at("bounds"))) found.bounds.push_back(bound(found, object("bounds", each)));
    for (const auto& [format, name] : object("files", fields.at("files"))) {
      found.files[format] = file(text("files", name));
      if (!manifest.files.contains(found.files[format])) refuse("the file of " + of + " is not among the files");
    }
    return found;
  }

  static std::optional<size_t> weights_of_examples(const Manifest& manifest, const Program& program, const json::Value& tree, size_t leaves) {
    if (!manifest.weighted) return std::nullopt;
    const auto refuse_batch = [] { refuse("a batch has no weights of its examples"); };
    if (tree.object() == nullptr || !tree.object()->contains("named") || leaves == 0 || leaves > program.data.size()) refuse_batch();
    const json::Object& named = object("named", tree.object()->at("named"));
    if (!named.contains("weights") || named.at("weights").text() == nullptr) refuse_batch();
    const size_t place = program.data[leaves - 1];  // a batch is inputs, target, weights
    if (!at::isFloatingType(program.inputs[place].spec.dtype) || program.inputs[place].spec.shape.empty()) refuse_batch();
    return place;
  }

  static bool has_weight(const Manifest& manifest, const Entry& entry) {
    for (const auto* part : {&manifest.state, &manifest.fixed, &manifest.constants}) {
      const auto own = part->find(*entry.weight);
      if (own == part->end()) continue;
      if (own->second == entry.spec) return true;
      Spec over_tasks = own->second;
      over_tasks.shape.insert(over_tasks.shape.begin(), manifest.num_tasks.value_or(0));
      return part == &manifest.state && manifest.num_tasks && over_tasks == entry.spec;
    }
    return false;
  }

  static std::vector<Entry> entries(const std::string& of, const json::Value& found) {
    std::vector<Entry> result;
    std::set<std::string> names;
    for (const json::Value& each : array("inputs and outputs", found)) {
      const json::Object& fields = object("an input or output", each);
      require_keys("an input or output", fields, {"name", "role", "spec", "strides", "weight"});
      Entry own{text("name", fields.at("name")), text("role", fields.at("role")), spec(fields.at("spec")), {}, std::nullopt};
      for (const json::Value& stride : array("strides", fields.at("strides"))) own.strides.push_back(count("strides", stride, 0));
      if (own.strides.size() != own.spec.shape.size()) refuse("'" + own.name + "' has not one stride for each axis");
      int64_t room = kMaxElements;
      for (size_t axis = 0; axis < own.strides.size(); ++axis) {
        const int64_t steps = own.spec.shape[axis] - 1;
        if (steps <= 0) continue;
        if (own.strides[axis] > room / steps) refuse("'" + own.name + "' has too large strides");
        room -= own.strides[axis] * steps;
      }
      if (!fields.at("weight").is_null()) own.weight = text("weight", fields.at("weight"));
      if (!names.insert(own.name).second) refuse("'" + own.name + "' is there twice in " + of);
      result.push_back(std::move(own));
    }
    return result;
  }

  static size_t num_leaves(const json::Value& tree, int depth) {
    if (tree.text() != nullptr && *tree.text() == "tensor") return 1;
    if (tree.object() == nullptr || tree.object()->empty() || depth > 100) refuse("a tree is none");
    size_t leaves = 0;
    for (const auto& [kind, value] : *tree.object()) {
      if (kind == "value" || kind == "class") continue;
      if (kind == "list" || kind == "tuple") {
        for (const json::Value& each : array(kind, value)) leaves += num_leaves(each, depth + 1);
      } else if (kind == "dict" || kind == "named") {
        for (const auto& [key, each] : object(kind, value)) leaves += num_leaves(each, depth + 1);
      } else {
        refuse("a tree is none");
      }
    }
    return leaves;
  }

  static Noise noise(const json::Object& fields) {
    require_keys("noise", fields, {"kind", "constants", "spec", "order"});
    Noise found{text("kind", fields.at("kind")), {}};
    for (const json::Value& each : array("constants", fields.at("constants"))) {
      if (each.number() == nullptr) refuse("the constants of noise must be numbers");
      found.constants.push_back(each.number()->as_double());
    }
    const std::map<std::string, size_t> sizes = {{"bernoulli", 1}, {"uniform", 2}, {"normal", 2}, {"exponential", 1}, {"randint", 2}, {"randperm", 1}};
    const auto size = sizes.find(found.kind);
    if (size == sizes.end() || size->second != found.constants.size()) refuse("noise of kind '" + found.kind + "' is not known");
    return found;
  }

  static Bound bound(const Program& program, const json::Object& fields) {
    require_keys("a bound", fields, {"position", "name", "size", "ignore_index", "of", "part"});
    Bound found{count("position", fields.at("position"), 0), count("size", fields.at("size"), 0), std::nullopt, text("of", fields.at("of")), {}};
    if (const json::Value& ignored = fields.at("ignore_index"); !ignored.is_null()) {
      found.ignore_index = ignored.number() == nullptr ? std::nullopt : ignored.number()->as_int();
      if (!found.ignore_index) refuse("'ignore_index' must be a whole number");
    }
    if (static_cast<size_t>(found.position) >= program.data.size()) refuse("a bound is for an input that is not there");
    const Spec& spec = program.inputs[program.data[static_cast<size_t>(found.position)]].spec;
    if (!at::isIntegralType(spec.dtype, true)) refuse("a bound is for an input that holds no integers");
    if (const json::Value& part = fields.at("part"); !part.is_null()) {
      std::vector<int64_t> shape;
      for (const json::Value* each = &part; each->array() != nullptr; each = &each->array()->front()) {
        shape.push_back(static_cast<int64_t>(each->array()->size()));
        if (each->array()->empty()) break;
      }
      if (shape.size() > spec.shape.size() || !std::equal(shape.rbegin(), shape.rend(), spec.shape.rbegin())) refuse("the part of a bound has another shape than its input");
      std::vector<char> values;
      flatten(part, shape, 0, values);
      found.part = at::empty(shape, at::dtype(at::kBool));
      std::copy(values.begin(), values.end(), static_cast<char*>(found.part.mutable_data_ptr()));
    }
    return found;
  }

  static void flatten(const json::Value& part, const std::vector<int64_t>& shape, size_t axis, std::vector<char>& to) {
    if (axis == shape.size()) {
      to.push_back(flag("part", part) ? 1 : 0);
      return;
    }
    const json::Array& rows = array("part", part);
    if (static_cast<int64_t>(rows.size()) != shape[axis]) refuse("the rows of 'part' have different lengths");
    for (const json::Value& row : rows) flatten(row, shape, axis + 1, to);
  }

  static Spec spec(const json::Value& found) {
    const json::Object& fields = object("spec", found);
    require_keys("a tensor", fields, {"shape", "dtype"});
    const std::string& name = text("dtype", fields.at("dtype"));
    const auto dtype = std::find_if(std::begin(kDtypes), std::end(kDtypes), [&](const Dtype& each) { return name == each.name; });
    if (dtype == std::end(kDtypes)) refuse("there is no dtype '" + name + "'");
    Spec result{{}, dtype->type};
    for (const json::Value& each : array("shape", fields.at("shape"))) result.shape.push_back(count("shape", each, 0));
    if (num_elements(result.shape) < 0) refuse("a tensor has a shape that is too large");
    return result;
  }

  static std::map<std::string, Spec> specs(const char* name, const json::Value& found) {
    std::map<std::string, Spec> result;
    for (const auto& [key, each] : object(name, found)) result[key] = spec(each);
    return result;
  }

  static const std::string& file(const std::string& name) {
    if (!is_file_name(name)) refuse("'" + name + "' is no name of a file in the folder");
    return name;
  }

  static void require_keys(const std::string& what, const json::Object& fields, const std::set<std::string>& wanted) {
    for (const std::string& key : wanted)
      if (!fields.contains(key)) refuse(what + " has no entry '" + key + "'");
    for (const auto& [key, value] : fields)
      if (!wanted.contains(key)) refuse(what + " has an entry '" + key + "'");
  }

  static const json::Value& at(const char* what, const json::Object& fields, const char* key) {
    const auto found = fields.find(key);
    if (found == fields.end()) refuse(std::string(what) + " has no entry '" + key + "'");
    return found->second;
  }
  static const json::Object& object(const std::string& name, const json::Value& found) {
    if (found.object() == nullptr) refuse("'" + name + "' must be an object");
    return *found.object();
  }
  static const json::Array& array(const std::string& name, const json::Value& found) {
    if (found.array() == nullptr) refuse("'" + name + "' must be a list");
    return *found.array();
  }
  static const std::string& text(const char* name, const json::Value& found) {
    if (found.text() == nullptr) refuse(std::string("'") + name + "' must be a text");
    return *found.text();
  }
  static bool flag(const char* name, const json::Value& found) {
    if (found.boolean() == nullptr) refuse(std::string("'") + name + "' must be true or false");
    return *found.boolean();
  }
  static int64_t count(const char* name, const json::Value& found, int64_t least) {
    const auto value = found.number() == nullptr ? std::nullopt : found.number()->as_int();
    if (!value || *value < least) refuse(std::string("'") + name + "' must be a whole number of at least " + std::to_string(least));
    return *value;
  }
};

}  // namespace detail

// Compares a file of the folder with what the manifest says, and hands its bytes to `keep` if that is not null.
inline File::Identity check_file(const fs::path& folder, const std::string& name, const FileEntry& wanted, std::string* keep = nullptr) {
  File file(folder / name, false);
  Sha256 hash;
  uint64_t bytes = 0;
  if (file.size() == wanted.bytes) {
    file.read([&](const char* data, size_t size) {
      hash.update(data, size);
      bytes += size;
      if (keep != nullptr) keep->append(data, size);
    });
  }
  if (bytes != wanted.bytes || hash.hex() != wanted.sha256)
    throw Error((folder / name).string() + " is not the file that was exported: its hash differs. Copy the folder again, or export again");
  return file.identity();
}

// Reads the manifest of a folder, and compares every file in it with what the manifest says. `weights` receives those of the folder.
inline Manifest read_manifest(const fs::path& folder, std::string* weights) {
  const fs::path path = folder / kManifest;
  File file(path, false);
  if (file.size() > kMaxManifestBytes) throw Error(path.string() + " has more bytes than any manifest has; export again");
  Manifest manifest;
  try {
    const json::Value document = json::parse(file.read_all());
    const json::Object* found = document.object();
    const auto text_at = [&](const char* key) { return found != nullptr && found->contains(key) ? found->at(key).text() : nullptr; };
    if (text_at("format") == nullptr || *text_at("format") != "adaptrt export") throw Error("it is no manifest of an export");
    const json::Number* version = found->contains("format_version") ? found->at("format_version").number() : nullptr;
    if (version == nullptr || version->text != std::to_string(kFormatVersion))
      throw Error("it was written in another format than " + std::to_string(kFormatVersion) + ", the only one that this program reads");
    json::Object fields = *found;
    fields.erase("digest");
    if (text_at("digest") == nullptr || *text_at("digest") != sha256(json::canonical(json::Value(fields))))
      throw Error("its digest is not that of what it says. Copy the folder again, or export again");
    manifest = detail::Reading().manifest(fields);
  } catch (const Error& error) {
    throw Error(path.string() + ": " + error.what());
  }
  std::error_code error;
  for (fs::directory_iterator each(folder, error), end; !error && each != end; each.increment(error)) {
    const std::string name = each->path().filename().string();
    if (name != kManifest && !manifest.files.contains(name))
      throw Error(each->path().string() + " is in the folder, and the manifest does not know it; remove it, or export again");
  }
  if (error) throw Error(folder.string() + " cannot be read: " + error.message());
  for (auto& [name, wanted] : manifest.files) wanted.checked = check_file(folder, name, wanted, name == kWeights ? weights : nullptr);
  return manifest;
}

// The version of the libraries that are loaded, or if they do not say it, of those that this program was built with.
inline std::string torch_version() {
  const std::string config = at::show_config(), key = "TORCH_VERSION=";
  const size_t place = config.find(key);
  if (place == std::string::npos) return TORCH_VERSION;
  const size_t begin = place + key.size();
  return config.substr(begin, config.find_first_of(", \n", begin) - begin);
}

// Checks that machine code of an export can run here: in this PyTorch, on this architecture and system, with these instruction sets.
inline void require_machine(const Manifest& manifest) {
  const std::string advice = "; export on a machine like this one, or use another format of the export";
  // The Python package adds what it was built for, as in "2.13.0+cpu", which libtorch does not know about itself.
  const auto release = [](const std::string& version) { return version.substr(0, version.find('+')); };
  if (const std::string here = torch_version(); release(manifest.torch) != release(here))
    throw Error("the package was compiled with PyTorch " + manifest.torch + ", and does not fit the libraries of " + here + advice);
  struct utsname here {};
  if (::uname(&here) != 0) throw Error("the system does not say what machine this is");
  const auto require = [&](const char* what, const std::string& wanted, const std::string& found) {
    if (wanted != found) throw Error(std::string("the package was compiled for ") + what + " '" + wanted + "', and this is '" + found + "'" + advice);
  };
  require("architecture", manifest.machine.architecture, here.machine);
  require("system", manifest.machine.system, here.sysname);
  require("device", manifest.machine.device, "cpu");
  const auto capabilities = at::cpu::get_cpu_capabilities();
  std::string missing;
  for (const std::string& each : manifest.machine.instruction_sets) {
    const auto found = capabilities.find(each);
    if (found == capabilities.end()) throw Error("the package was compiled for a processor with " + each + ", which PyTorch cannot look for here" + advice);
    if (!found->second.isBool() || !found->second.toBool()) missing += (missing.empty() ? "" : ", ") + each;
  }
  if (!missing.empty()) throw Error("the package was compiled for a processor with " + missing + ", which this one has not" + advice);
}

}  // namespace adaptrt
