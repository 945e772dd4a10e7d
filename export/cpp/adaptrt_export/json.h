// A strict reader of JSON, and the one way of writing it from which the digest of a manifest is computed.
//
// Stricter than RFC 8259 asks: UTF-8 only, no byte-order mark, no key twice in an object, at most 256 levels. As Python's json module does,
// it takes NaN, Infinity and -Infinity.

#pragma once

#include <charconv>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace adaptrt {

// Whatever is wrong with a folder, a file or a call. The message says what, and what to do.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

namespace json {

// A number, by its text: JSON has whole numbers of any size, and the digest needs them as they were written.
struct Number {
  std::string text;
  bool whole;

  std::optional<int64_t> as_int() const {
    int64_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (!whole || error != std::errc() || end != text.data() + text.size()) return std::nullopt;
    return value;
  }

  double as_double() const {
    if (text == "NaN") return std::numeric_limits<double>::quiet_NaN();
    if (text == "Infinity") return std::numeric_limits<double>::infinity();
    if (text == "-Infinity") return -std::numeric_limits<double>::infinity();
    double value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size()) throw Error("the number " + text.substr(0, 40) + " is too large or too small");
    return value;
  }
};

class Value;
using Array = std::vector<Value>;
using Object = std::map<std::string, Value>;  // sorted by bytes of UTF-8, which is the order of the code points

class Value {
 public:
  using Content = std::variant<std::nullptr_t, bool, Number, std::string, Array, Object>;

  Value() : content_(nullptr) {}
  Value(Content content) : content_(std::move(content)) {}

  bool is_null() const { return std::holds_alternative<std::nullptr_t>(content_); }
  const bool* boolean() const { return std::get_if<bool>(&content_); }
  const Number* number() const { return std::get_if<Number>(&content_); }
  const std::string* text() const { return std::get_if<std::string>(&content_); }
  const Array* array() const { return std::get_if<Array>(&content_); }
  const Object* object() const { return std::get_if<Object>(&content_); }
  const Content& content() const { return content_; }

 private:
  Content content_;
};

namespace detail {

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Value document() {
    Value found = value(0);
    skip();
    if (at_ != text_.size()) refuse("there is more behind the end");
    return found;
  }

 private:
  static constexpr int kMaxDepth = 256;
  static constexpr size_t kMaxDigits = 4300;  // as Python

  [[noreturn]] void refuse(const std::string& reason) const { throw Error(reason + ", at byte " + std::to_string(at_)); }
  bool more() const { return at_ < text_.size(); }
  char peek() const { return more() ? text_[at_] : '\0'; }

  void skip() {
    while (more() && (text_[at_] == ' ' || text_[at_] == '\t' || text_[at_] == '\n' || text_[at_] == '\r')) ++at_;
  }

  bool take(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }

  void require(char wanted) {
    if (!more() || text_[at_] != wanted) refuse(std::string("there should be a '") + wanted + "'");
    ++at_;
  }

  Value value(int depth) {
    if (depth > kMaxDepth) refuse("it is nested too deeply");
    skip();
    switch (peek()) {
      case '{': return object(depth);
      case '[': return array(depth);
      case '"': return Value(string());
      default: break;
    }
    if (take("null")) return Value();
    if (take("true")) return Value(true);
    if (take("false")) return Value(false);
    return Value(number());
  }

  Value object(int depth) {
    Object found;
    require('{');
    skip();
    if (peek() == '}') {
      ++at_;
      return Value(std::move(found));
    }
    while (true) {
      skip();
      std::string key = string();
      skip();
      require(':');
      Value entry = value(depth + 1);
      if (!found.emplace(std::move(key), std::move(entry)).second) refuse("a key is there twice");
      skip();
      if (peek() != ',') break;
      ++at_;
    }
    require('}');
    return Value(std::move(found));
  }

  Value array(int depth) {
    Array found;
    require('[');
    skip();
    if (peek() == ']') {
      ++at_;
      return Value(std::move(found));
    }
    while (true) {
      found.push_back(value(depth + 1));
      skip();
      if (peek() != ',') break;
      ++at_;
    }
    require(']');
    return Value(std::move(found));
  }

  size_t digits() {
    const size_t first = at_;
    while (more() && text_[at_] >= '0' && text_[at_] <= '9') ++at_;
    if (at_ == first) refuse("there should be a value");
    if (at_ - first > kMaxDigits) refuse("a number has too many digits");
    return at_ - first;
  }

  Number number() {
    for (const char* name : {"NaN", "Infinity", "-Infinity"})
      if (take(name)) return {name, false};
    const size_t first = at_;
    bool whole = true;
    if (peek() == '-') ++at_;
    const bool zero = peek() == '0';
    if (digits() > 1 && zero) refuse("a number begins with 0");
    if (peek() == '.') {
      whole = false;
      ++at_;
      digits();
    }
    if (peek() == 'e' || peek() == 'E') {
      whole = false;
      ++at_;
      if (peek() == '+' || peek() == '-') ++at_;
      digits();
    }
    Number found{std::string(text_.substr(first, at_ - first)), whole};
    if (!whole) found.as_double();
    if (found.text == "-0" && whole) found.text = "0";
    return found;
  }

  uint32_t hex() {
    uint32_t code = 0;
    const std::string_view part = text_.substr(at_, 4);
    const auto [end, error] = std::from_chars(part.data(), part.data() + part.size(), code, 16);
    if (part.size() != 4 || error != std::errc() || end != part.data() + 4) refuse("\\u needs four hexadecimal digits");
    at_ += 4;
    return code;
  }

  static void append(std::string& to, uint32_t code) {
    if (code < 0x80) {
      to += static_cast<char>(code);
      return;
    }
    const int rest = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    constexpr uint32_t kLead[] = {0, 0xC0, 0xE0, 0xF0};
    to += static_cast<char>(kLead[rest] | (code >> (6 * rest)));
    for (int place = rest - 1; place >= 0; --place) to += static_cast<char>(0x80 | ((code >> (6 * place)) & 0x3F));
  }

  void escape(std::string& to) {
    switch (const char kind = peek(); ++at_, kind) {
      case '"': case '\\': case '/': to += kind; return;
      case 'b': to += '\b'; return;
      case 'f': to += '\f'; return;
      case 'n': to += '\n'; return;
      case 'r': to += '\r'; return;
      case 't': to += '\t'; return;
      case 'u': break;
      default: refuse("there is no such escape");
    }
    uint32_t code = hex();
    if (code >= 0xD800 && code < 0xE000) {
      if (code >= 0xDC00 || !take("\\u")) refuse("half of a surrogate pair is missing");
      const uint32_t low = hex();
      if (low < 0xDC00 || low >= 0xE000) refuse("half of a surrogate pair is missing");
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    append(to, code);
  }

  std::string string() {
    std::string found;
    require('"');
    while (true) {
      if (!more()) refuse("a text has no end");
      const auto byte = static_cast<unsigned char>(text_[at_]);
      if (byte == '"') break;
      if (byte < 0x20) refuse("a text holds a control character");
      if (byte == '\\') {
        ++at_;
        escape(found);
      } else if (byte < 0x80) {
        found += static_cast<char>(byte);
        ++at_;
      } else {
        append(found, decode());
      }
    }
    ++at_;
    return found;
  }

  // Decodes one code point that is not ASCII. Bytes that are no UTF-8 are refused: longer forms than needed, surrogates, what is too large.
  uint32_t decode() {
    const auto lead = static_cast<unsigned char>(text_[at_]);
    const int rest = lead >= 0xC2 && lead < 0xE0 ? 1 : lead >= 0xE0 && lead < 0xF0 ? 2 : lead >= 0xF0 && lead < 0xF5 ? 3 : 0;
    if (rest == 0 || text_.size() - at_ <= static_cast<size_t>(rest)) refuse("a text is not in UTF-8");
    uint32_t code = lead & (0x3Fu >> rest);
    for (int place = 1; place <= rest; ++place) {
      const auto byte = static_cast<unsigned char>(text_[at_ + static_cast<size_t>(place)]);
      if ((byte & 0xC0) != 0x80) refuse("a text is not in UTF-8");
      code = (code << 6) | (byte & 0x3F);
    }
    constexpr uint32_t kLeast[] = {0, 0x80, 0x800, 0x10000};
    if (code < kLeast[rest] || code > 0x10FFFF || (code >= 0xD800 && code < 0xE000)) refuse("a text is not in UTF-8");
    at_ += static_cast<size_t>(rest) + 1;
    return code;
  }

  std::string_view text_;
  size_t at_ = 0;
};

inline void write_text(std::string& to, std::string_view text) {
  constexpr char kHex[] = "0123456789abcdef";
  const auto unit = [&](uint32_t code) {
    to += "\\u";
    for (int shift = 12; shift >= 0; shift -= 4) to += kHex[(code >> shift) & 15];
  };
  to += '"';
  for (size_t at = 0; at < text.size();) {
    const auto lead = static_cast<unsigned char>(text[at]);
    if (lead >= 0x80) {  // it is valid UTF-8: the parser has decoded it
      const int rest = lead < 0xE0 ? 1 : lead < 0xF0 ? 2 : 3;
      uint32_t code = lead & (0x3Fu >> rest);
      for (int place = 0; place < rest; ++place) code = (code << 6) | (static_cast<unsigned char>(text[++at]) & 0x3F);
      if (code >= 0x10000) {
        unit(0xD800 + ((code - 0x10000) >> 10));
        unit(0xDC00 + ((code - 0x10000) & 0x3FF));
      } else {
        unit(code);
      }
    } else if (lead == '"' || lead == '\\') {
      to += '\\';
      to += static_cast<char>(lead);
    } else if (lead == '\b') {
      to += "\\b";
    } else if (lead == '\f') {
      to += "\\f";
    } else if (lead == '\n') {
      to += "\\n";
    } else if (lead == '\r') {
      to += "\\r";
    } else if (lead == '\t') {
      to += "\\t";
    } else if (lead < 0x20 || lead == 0x7F) {
      unit(lead);
    } else {
      to += static_cast<char>(lead);
    }
    ++at;
  }
  to += '"';
}

// Writes a float as Python's repr does: the fewest digits that are this number, with an exponent below 1e-4 and from 1e16 on.
inline void write_double(std::string& to, double value) {
  if (!std::isfinite(value)) {
    to += std::isnan(value) ? "NaN" : value > 0 ? "Infinity" : "-Infinity";
    return;
  }
  char buffer[64];
  const auto end = std::to_chars(buffer, buffer + sizeof buffer, value, std::chars_format::scientific).ptr;
  const std::string_view text(buffer, static_cast<size_t>(end - buffer));
  const size_t mark = text.find('e');
  int exponent = 0;
  const char* begin = text.data() + mark + (text[mark + 1] == '+' ? 2 : 1);
  std::from_chars(begin, end, exponent);
  if (exponent < -4 || exponent >= 16) {
    to += text;
    return;
  }
  const auto fixed = std::to_chars(buffer, buffer + sizeof buffer, value, std::chars_format::fixed).ptr;
  const std::string_view plain(buffer, static_cast<size_t>(fixed - buffer));
  to += plain;
  if (plain.find('.') == std::string_view::npos) to += ".0";
}

inline void write(std::string& to, const Value& value) {
  if (value.is_null()) {
    to += "null";
  } else if (const bool* flag = value.boolean()) {
    to += *flag ? "true" : "false";
  } else if (const Number* number = value.number()) {
    if (number->whole) to += number->text;
    else write_double(to, number->as_double());
  } else if (const std::string* text = value.text()) {
    write_text(to, *text);
  } else if (const Array* array = value.array()) {
    to += '[';
    for (const Value& entry : *array) {
      if (&entry != array->data()) to += ',';
      write(to, entry);
    }
    to += ']';
  } else {
    to += '{';
    bool first = true;
    for (const auto& [key, entry] : *value.object()) {
      if (!first) to += ',';
      first = false;
      write_text(to, key);
      to += ':';
      write(to, entry);
    }
    to += '}';
  }
}

}  // namespace detail

// Reads a document. Throws Error where it is not JSON.
inline Value parse(std::string_view text) { return detail::Parser(text).document(); }

// Writes a document as Python's json.dumps(value, sort_keys=True, separators=(",", ":")) does: in ASCII, without spaces.
inline std::string canonical(const Value& value) {
  std::string found;
  detail::write(found, value);
  return found;
}

}  // namespace json
}  // namespace adaptrt
