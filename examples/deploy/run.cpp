// Run a package of torch.export and AOTInductor without Python: run LIBRARY PACKAGE INPUTS OUTPUTS
//
// LIBRARY is asa_ops/_C.abi3.so, which holds the ops; INPUTS a list of tensors written by torch.save, OUTPUTS the tuple
// of those that come out, for torch.load. docs/deploy.md makes packages. To build it, with TORCH the folder of torch:
//
//   g++ -std=c++20 -O2 -I$TORCH/include run.cpp -o run -L$TORCH/lib -Wl,-rpath,$TORCH/lib \
//     -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10

#include <ATen/core/ivalue.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <dlfcn.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <vector>

int main(int argc, char** argv) {
  if (argc != 5) {
    std::cerr << "usage: run LIBRARY PACKAGE INPUTS OUTPUTS\n";
    return 2;
  }
  if (dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    std::cerr << dlerror() << '\n';
    return 1;
  }
  std::ifstream file(argv[3], std::ios::binary);
  if (!file) {
    std::cerr << "cannot read " << argv[3] << '\n';
    return 1;
  }
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  std::vector<at::Tensor> inputs;
  const c10::IValue list = torch::jit::pickle_load(bytes);
  for (const c10::IValue& x : list.toListRef()) inputs.push_back(x.toTensor());
  torch::inductor::AOTIModelPackageLoader model(argv[2]);
  const std::vector<at::Tensor> outputs = model.run(inputs);
  std::vector<c10::IValue> written_tensors;
  for (const at::Tensor& x : outputs) {
    std::cout << x.sizes() << ", mean " << x.mean().item<double>() << '\n';
    written_tensors.emplace_back(x);
  }
  const std::vector<char> written = torch::jit::pickle_save(c10::ivalue::Tuple::create(written_tensors));
  std::ofstream out(argv[4], std::ios::binary);
  out.write(written.data(), static_cast<std::streamsize>(written.size()));
  out.close();
  if (!out) {
    std::cerr << "cannot write " << argv[4] << '\n';
    return 1;
  }
}
