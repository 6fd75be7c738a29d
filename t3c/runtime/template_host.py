"""The text of run.cc, which ships in every artifact: a C++ host on the headers of tvm-ffi alone."""

RUN_CC = r"""// Run one profile without Python. Needs the headers of apache-tvm-ffi, and
// libtvm_runtime.so and libtvm_ffi.so of the device:
//   g++ -O1 -std=c++17 run.cc -o run -I HEADERS -L LIBS -Wl,--no-as-needed -ltvm_runtime -ltvm_ffi
//   LD_LIBRARY_PATH=LIBS ./run ARTIFACT PROFILE FOLDER [FUNCTION BYTES]
// Reads FOLDER/0.in, 1.in, ... (raw bytes; an absent input is all ones), writes FOLDER/0.out, ...
// and prints a line for every output: its data type and shape; then the seconds of a second call.
// FUNCTION names another function on the same arguments with an arena of BYTES bytes: it is called
// once, and what it leaves in the arena is written behind the outputs.
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace ffi = tvm::ffi;
using ffi::json::Array;
using ffi::json::Object;

struct Aligned {
  void AllocData(DLTensor* t) {
    t->data = std::aligned_alloc(64, (ffi::GetDataSize(*t) / 64 + 1) * 64);
  }
  void FreeData(DLTensor* t) { std::free(t->data); }
};

std::string Read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::string Text(const ffi::Any& value) { return value.cast<ffi::String>(); }

DLDataType Type(const std::string& name) {  // numpy's names, and safetensors' in capitals
  if (name == "bool" || name == "BOOL") return {kDLBool, 8, 1};
  const char first = name[0];
  const auto bits = static_cast<uint8_t>(std::stoi(name.substr(name.find_first_of("123468"))));
  const bool whole = first == 'i' || first == 'I', natural = first == 'u' || first == 'U';
  return {static_cast<uint8_t>(whole ? kDLInt : natural ? kDLUInt : kDLFloat), bits, 1};
}

ffi::Tensor Make(const Array& dims, const std::string& type) {
  ffi::Array<int64_t> shape;
  for (const auto& n : dims) shape.push_back(n.cast<int64_t>());
  const DLDevice host{kDLCPU, 0};
  return ffi::Tensor::FromNDAlloc(Aligned(), ffi::Shape(shape), Type(type), host);
}

ffi::Tensor Vector(int64_t count, const std::string& type) {
  Array dims;
  dims.push_back(std::max<int64_t>(1, count));
  return Make(dims, type);
}

void Write(const std::string& path, const ffi::Tensor& y) {
  std::ofstream file(path, std::ios::binary);
  file.write(static_cast<const char*>(y.data_ptr()), ffi::GetDataSize(y));
  std::printf("output %s", std::string(ffi::DLDataTypeToString(y.dtype())).c_str());
  for (int64_t n : y.shape()) std::printf(" %lld", static_cast<long long>(n));
  std::printf("\n");
}

void Ones(ffi::Tensor* t) {
  const DLDataType type = t->dtype();
  const size_t step = type.bits / 8, size = ffi::GetDataSize(*t);
  const float one = 1;
  const int64_t whole = 1;
  const double wide = 1;
  const uint16_t half = 0x3C00;
  const void* from = type.code != kDLFloat ? static_cast<const void*>(&whole)
                     : step == 2 ? static_cast<const void*>(&half)
                     : step == 4 ? static_cast<const void*>(&one)
                                 : static_cast<const void*>(&wide);
  for (size_t i = 0; i < size; i += step) {
    std::memcpy(static_cast<char*>(t->data_ptr()) + i, from, step);
  }
}

int main(int argc, char** argv) try {
  if (argc < 4) throw std::runtime_error("usage: run ARTIFACT PROFILE FOLDER [FUNCTION]");
  const std::string root = std::string(argv[1]) + "/", wanted = argv[2];
  const std::string folder = std::string(argv[3]) + "/";
  const auto manifest = ffi::json::Parse(Read(root + "manifest.json")).cast<Object>();
  if (Text(manifest["target"].cast<Object>()["kind"]) != "llvm") {
    throw std::runtime_error("this host is for CPU libraries; use run.py for the others");
  }
  const std::string raw = Read(root + "weights.safetensors");
  uint64_t length = 0;
  std::memcpy(&length, raw.data(), 8);
  const auto header = ffi::json::Parse(raw.substr(8, length)).cast<Object>();
  ffi::Array<ffi::Any> arguments;
  int64_t index = 0;
  for (const auto& item : manifest["inputs"].cast<Array>()) {
    const auto spec = item.cast<Object>();
    ffi::Tensor x = Make(spec["shape"].cast<Array>(), Text(spec["dtype"]));
    const std::string path = folder + std::to_string(index++) + ".in";
    if (std::ifstream(path).good()) {
      const std::string bytes = Read(path);
      if (bytes.size() != ffi::GetDataSize(x)) {
        throw std::runtime_error(path + " has " + std::to_string(bytes.size()) + " bytes");
      }
      std::memcpy(x.data_ptr(), bytes.data(), bytes.size());
    } else {
      Ones(&x);
    }
    arguments.push_back(x);
  }
  std::vector<ffi::Tensor> weights;
  std::string function;
  int64_t bytes = 0;
  for (const auto& item : manifest["profiles"].cast<Array>()) {
    const auto profile = item.cast<Object>();
    if (Text(profile["name"]) != wanted) continue;
    function = Text(profile["function"]);
    bytes = profile["arena_bytes"].cast<int64_t>();
    for (const auto& name : profile["weights"].cast<Array>()) {
      const auto entry = header[name].cast<Object>();
      ffi::Tensor w = Make(entry["shape"].cast<Array>(), Text(entry["dtype"]));
      const auto begin = entry["data_offsets"].cast<Array>()[0].cast<int64_t>();
      std::memcpy(w.data_ptr(), raw.data() + 8 + length + begin, ffi::GetDataSize(w));
      weights.push_back(w);
    }
  }
  if (function.empty()) throw std::runtime_error("no profile " + wanted);
  if (argc > 5) {
    function = argv[4];
    bytes = std::stoll(argv[5]);
  }
  const auto count = static_cast<int64_t>(weights.size());
  ffi::Tensor addresses = Vector(count, "int64");
  auto* table = static_cast<int64_t*>(addresses.data_ptr());
  for (int64_t i = 0; i < count; ++i) table[i] = reinterpret_cast<int64_t>(weights[i].data_ptr());
  ffi::Tensor arena = Vector(bytes, "uint8");
  arguments.push_back(addresses);
  arguments.push_back(arena);
  std::vector<ffi::Tensor> outs;
  for (const auto& item : manifest["outputs"].cast<Array>()) {
    const auto spec = item.cast<Object>();
    outs.push_back(Make(spec["shape"].cast<Array>(), Text(spec["dtype"])));
    arguments.push_back(outs.back());
  }
  ffi::Module library = ffi::Module::LoadFromFile(root + Text(manifest["library"]));
  ffi::Function call = library->GetFunction(function).value();
  std::vector<ffi::AnyView> views(arguments.begin(), arguments.end());
  ffi::Any result;
  call.CallPacked(views.data(), static_cast<int>(views.size()), &result);
  if (result.cast<int64_t>() != 0) throw std::runtime_error("a kernel found no memory");
  if (argc > 5) outs.push_back(arena);
  for (size_t i = 0; i < outs.size(); ++i) Write(folder + std::to_string(i) + ".out", outs[i]);
  if (argc > 5) return 0;
  const auto begin = std::chrono::steady_clock::now();
  call.CallPacked(views.data(), static_cast<int>(views.size()), &result);
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
  std::printf("seconds %.9f\n", took.count());
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "run: %s\n", error.what());
  return 1;
}
"""
