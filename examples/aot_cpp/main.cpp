// Runs the package of examples/export_aot.py without Python and compares with what eager mode gave.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <fstream>
#include <iostream>
#include <string>
#include <vector>

namespace {

// A file of numbers of one type.
template <class T>
std::vector<T> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  TORCH_CHECK(file, "cannot read ", path);
  std::vector<T> values(static_cast<size_t>(file.tellg()) / sizeof(T));
  file.seekg(0);
  file.read(reinterpret_cast<char*>(values.data()), values.size() * sizeof(T));
  return values;
}

}  // namespace

int main(int argc, char** argv) {
  TORCH_CHECK(argc == 2, "usage: aot_block FOLDER");
  const std::string folder = argv[1];
  auto hidden = read<float>(folder + "/hidden_states.bin"), wanted = read<float>(folder + "/expected.bin");
  auto slots = read<int32_t>(folder + "/mapping.bin");
  const auto tokens = static_cast<int64_t>(slots.size());
  const auto hidden_states = torch::from_blob(hidden.data(), {tokens, static_cast<int64_t>(hidden.size()) / tokens});
  const auto expected = torch::from_blob(wanted.data(), hidden_states.sizes());
  const auto mapping = torch::from_blob(slots.data(), {tokens}, torch::kInt32);

  c10::InferenceMode inference;
  torch::inductor::AOTIModelPackageLoader package(folder + "/block.pt2");
  const auto output = package.run({hidden_states, mapping}).at(0);
  const double difference = (output - expected).abs().max().item<double>();
  std::cout << "output " << output.sizes() << ", largest difference from eager " << difference << std::endl;
  return difference < 1e-4 ? 0 : 1;
}
