// Reads and writes safetensors files: 8 bytes that say how long the header is, a header in JSON, and the values of all tensors.
//
// Known limits: little-endian machines only.

#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <fstream>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "files.h"
#include "json.h"

namespace adaptrt {

static_assert(std::endian::native == std::endian::little);

using Tensors = std::map<std::string, at::Tensor>;

struct Dtype {
  at::ScalarType type;
  const char* name;  // in a manifest
  const char* code;  // in a safetensors file
};

inline constexpr Dtype kDtypes[] = {
    {at::kDouble, "float64", "F64"}, {at::kFloat, "float32", "F32"}, {at::kHalf, "float16", "F16"}, {at::kBFloat16, "bfloat16", "BF16"},
    {at::kLong, "int64", "I64"},     {at::kInt, "int32", "I32"},     {at::kShort, "int16", "I16"},  {at::kChar, "int8", "I8"},
    {at::kByte, "uint8", "U8"},      {at::kBool, "bool", "BOOL"},
};

inline constexpr int64_t kMaxElements = int64_t{1} << 40;

// Returns the number of elements of a shape, or -1 if it is no shape of a tensor that could be. Axes of length 0 do not excuse others that are
// too long, since PyTorch multiplies those when it computes strides.
inline int64_t num_elements(const std::vector<int64_t>& shape) {
  if (shape.size() > 64) return -1;
  int64_t room = 1;
  bool empty = false;
  for (const int64_t size : shape) {
    if (size < 0) return -1;
    if (size > kMaxElements / room) return -1;
    room *= std::max<int64_t>(size, 1);
    empty = empty || size == 0;
  }
  return empty ? 0 : room;
}

namespace detail {

inline at::Tensor tensor_of(const std::string& name, const json::Value& found, std::string_view values, std::vector<std::pair<int64_t, int64_t>>& places) {
  const auto refuse = [&](const std::string& reason) { throw Error("tensor '" + name + "' " + reason); };
  const json::Object* fields = found.object();
  if (fields == nullptr || fields->size() != 3 || !fields->contains("dtype") || !fields->contains("shape") || !fields->contains("data_offsets"))
    refuse("must have a dtype, a shape and data_offsets");
  const std::string* code = fields->at("dtype").text();
  const auto dtype = std::find_if(std::begin(kDtypes), std::end(kDtypes), [&](const Dtype& each) { return code != nullptr && *code == each.code; });
  if (dtype == std::end(kDtypes)) refuse("has a dtype that is not known");
  const auto numbers = [&](const char* key) {
    std::vector<int64_t> result;
    const json::Array* entries = fields->at(key).array();
    if (entries == nullptr) refuse(std::string("has no list of ") + key);
    for (const json::Value& each : *entries) {
      const auto value = each.number() == nullptr ? std::nullopt : each.number()->as_int();
      if (!value || *value < 0) refuse(std::string("has ") + key + " that are no whole numbers of at least 0");
      result.push_back(*value);
    }
    return result;
  };
  const std::vector<int64_t> shape = numbers("shape"), offsets = numbers("data_offsets");
  const int64_t count = num_elements(shape);
  if (count < 0) refuse("has too large a shape");
  const auto bytes = count * static_cast<int64_t>(c10::elementSize(dtype->type));
  if (offsets.size() != 2 || offsets[0] > offsets[1] || offsets[1] > static_cast<int64_t>(values.size())) refuse("has offsets outside the file");
  if (offsets[1] - offsets[0] != bytes) refuse("has another number of bytes than its shape and dtype say");
  places.emplace_back(offsets[0], offsets[1]);
  const std::string_view own = values.substr(static_cast<size_t>(offsets[0]), static_cast<size_t>(bytes));
  if (dtype->type == at::kBool && std::any_of(own.begin(), own.end(), [](char each) { return each != 0 && each != 1; }))
    refuse("holds bytes that are neither true nor false");
  at::Tensor value = at::empty(shape, at::dtype(dtype->type));
  if (bytes > 0) std::memcpy(value.mutable_data_ptr(), own.data(), own.size());
  return value;
}

}  // namespace detail

// Reads the content of a safetensors file. Throws Error where it is not exactly that: every byte must belong to one tensor.
inline Tensors parse_safetensors(std::string_view content) {
  constexpr uint64_t kMaxHeader = 100'000'000;  // as the safetensors library
  uint64_t size = 0;
  if (content.size() < 8) throw Error("it is too short");
  std::memcpy(&size, content.data(), 8);
  if (size > kMaxHeader || size > content.size() - 8) throw Error("its header is longer than the file");
  const std::string_view values = content.substr(8 + size);
  const json::Value header = json::parse(content.substr(8, size));
  if (header.object() == nullptr) throw Error("its header is no object");
  Tensors found;
  std::vector<std::pair<int64_t, int64_t>> places;
  for (const auto& [name, entry] : *header.object())
    if (name != "__metadata__") found[name] = detail::tensor_of(name, entry, values, places);
  std::sort(places.begin(), places.end());
  int64_t end = 0;
  for (const auto& [first, last] : places) {
    if (first != end) throw Error("its tensors overlap, or there is something between them");
    end = last;
  }
  if (end != static_cast<int64_t>(values.size())) throw Error("there is more in it than its tensors");
  return found;
}

inline Tensors read_safetensors(const fs::path& path) {
  const std::string content = File(path, true).read_all();
  try {
    return parse_safetensors(content);
  } catch (const Error& error) {
    throw Error(path.string() + " is damaged, or is no safetensors file: " + error.what());
  }
}

// Writes tensors. The file appears under its name when it is whole.
inline void write_safetensors(const fs::path& path, const Tensors& tensors) {
  json::Object header;
  std::vector<at::Tensor> values;
  int64_t end = 0;
  const auto number = [](int64_t value) { return json::Value(json::Number{std::to_string(value), true}); };
  for (const auto& [name, tensor] : tensors) {
    const auto dtype = std::find_if(std::begin(kDtypes), std::end(kDtypes), [&](const Dtype& each) { return each.type == tensor.scalar_type(); });
    if (dtype == std::end(kDtypes)) throw Error("'" + name + "' has a dtype that safetensors files do not have");
    values.push_back(tensor.detach().cpu().contiguous());
    json::Array shape;
    for (const int64_t each : tensor.sizes()) shape.push_back(number(each));
    const int64_t first = end;
    end += static_cast<int64_t>(values.back().nbytes());
    header[name] = json::Value(json::Object{
        {"dtype", json::Value(std::string(dtype->code))}, {"shape", json::Value(std::move(shape))}, {"data_offsets", json::Value(json::Array{number(first), number(end)})}});
  }
  std::string text = json::canonical(json::Value(std::move(header)));
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const uint64_t size = text.size();
  fs::path partial = path;
  partial += ".partial";
  {
    std::ofstream file(partial, std::ios::binary | std::ios::trunc);
    file.write(reinterpret_cast<const char*>(&size), 8);
    file.write(text.data(), static_cast<std::streamsize>(text.size()));
    for (const at::Tensor& value : values)
      if (value.nbytes() > 0) file.write(static_cast<const char*>(value.const_data_ptr()), static_cast<std::streamsize>(value.nbytes()));
    file.flush();
    if (!file) {
      std::error_code ignored;
      fs::remove(partial, ignored);
      throw Error(path.string() + " cannot be written");
    }
  }
  std::error_code error;
  fs::rename(partial, path, error);
  if (error) throw Error(path.string() + " cannot be written: " + error.message());
}

}  // namespace adaptrt
