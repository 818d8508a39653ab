// Registers the operators with ONNX Runtime, one custom op for each type that T may be.

#include <deque>
#include <memory>

#include "compute.h"
#include "ort.h"
#include "schema.h"
#include "shapes.h"

namespace qcompile {
namespace {

constexpr ONNXTensorElementDataType kTypes[] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
                                                ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16,
                                                ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT};
constexpr int kMostVersions = 1000;

struct Op : OrtCustomOp {
  const Definition* definition;
  ONNXTensorElementDataType type;

  Op(const Definition& of, ONNXTensorElementDataType with);

  ONNXTensorElementDataType element(const Parameter& parameter) const {
    switch (parameter.type) {
      case Type::kInt8:
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
      case Type::kFp8:
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT8E4M3FN;
      case Type::kFloat32:
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
      case Type::kT:
        break;
    }
    return type;
  }
};

struct Running {
  const Definition* definition;
  std::unique_ptr<Node> node;
};

const Op& of(const OrtCustomOp* op) { return *static_cast<const Op*>(op); }

OrtCustomOpInputOutputCharacteristic presence(const Parameter& parameter) {
  return parameter.optional ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
}

Op::Op(const Definition& which, ONNXTensorElementDataType with)
    : OrtCustomOp{}, definition(&which), type(with) {
  version = kApiVersion;
  GetName = [](const OrtCustomOp* op) { return of(op).definition->name; };
  GetExecutionProviderType = [](const OrtCustomOp*) { return "CUDAExecutionProvider"; };
  GetInputTypeCount = [](const OrtCustomOp* op) {
    return static_cast<std::size_t>(of(op).definition->input_count);
  };
  GetOutputTypeCount = [](const OrtCustomOp* op) {
    return static_cast<std::size_t>(of(op).definition->output_count);
  };
  GetInputType = [](const OrtCustomOp* op, std::size_t index) {
    return of(op).element(of(op).definition->inputs[index]);
  };
  GetOutputType = [](const OrtCustomOp* op, std::size_t index) {
    return of(op).element(of(op).definition->outputs[index]);
  };
  GetInputCharacteristic = [](const OrtCustomOp* op, std::size_t index) {
    return presence(of(op).definition->inputs[index]);
  };
  GetOutputCharacteristic = [](const OrtCustomOp* op, std::size_t index) {
    return presence(of(op).definition->outputs[index]);
  };
  GetInputMemoryType = [](const OrtCustomOp*, std::size_t) { return OrtMemTypeDefault; };
  GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
  GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  GetStartVersion = [](const OrtCustomOp*) { return 1; };
  GetEndVersion = [](const OrtCustomOp*) { return kMostVersions; };
  InferOutputShapeFn = [](const OrtCustomOp* op, OrtShapeInferContext* context) {
    const Definition& definition = *of(op).definition;
    return guarded(definition.name, [&] { infer(definition, context); });
  };
  CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi*, const OrtKernelInfo* info,
                      void** kernel) {
    const Definition& definition = *of(op).definition;
    return guarded(definition.name, [&] {
      *kernel = new Running{&definition, make_node(definition, of(op).type, info)};
    });
  };
  KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    const auto& running = *static_cast<const Running*>(kernel);
    return guarded(running.definition->name, [&] {
      void* stream = nullptr;
      check(ort().KernelContext_GetGPUComputeStream(context, &stream));
      running.node->compute(context, stream);
    });
  };
  KernelDestroy = [](void* kernel) { delete static_cast<Running*>(kernel); };
}

// The operators live as long as the library: sessions refer to them.
const std::deque<Op>& operators() {
  static const std::deque<Op> made = [] {
    std::deque<Op> ops;
    for (int i = 0; i < kDefinitionCount; ++i) {
      for (const ONNXTensorElementDataType type : kTypes) {
        if (type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT || kDefinitions[i].result_type) {
          ops.emplace_back(kDefinitions[i], type);
        }
      }
    }
    return ops;
  }();
  return made;
}

}  // namespace
}  // namespace qcompile

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(
    OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace qcompile;
  const OrtApi* api = base->GetApi(kApiVersion);
  if (api == nullptr) {
    return nullptr;  // without an interface there is no way to say so; the ops will be missing
  }
  set_ort(api);
  return guarded("RegisterCustomOps", [&] {
    OrtCustomOpDomain* domain = nullptr;
    check(api->CreateCustomOpDomain(kDomain, &domain));
    for (const Op& op : operators()) {
      check(api->CustomOpDomain_Add(domain, &op));
    }
    check(api->AddCustomOpDomain(options, domain));
  });
}
