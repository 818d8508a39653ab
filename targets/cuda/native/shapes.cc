#include "shapes.h"

#include <string>

namespace qcompile {
namespace {

struct Dimension {
  std::int64_t size;
  std::string symbol;
};

struct Known {
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  std::vector<Dimension> shape;
};

// ONNX Runtime keeps the info itself.
Known known(OrtShapeInferContext* context, std::size_t index) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(ort().ShapeInferContext_GetInputTypeShape(context, index, &info));
  Known found;
  std::size_t rank = 0;
  check(ort().GetTensorElementType(info, &found.type));
  check(ort().GetDimensionsCount(info, &rank));
  std::vector<std::int64_t> sizes(rank);
  std::vector<const char*> symbols(rank, nullptr);
  check(ort().GetDimensions(info, sizes.data(), rank));
  check(ort().GetSymbolicDimensions(info, symbols.data(), rank));
  for (std::size_t i = 0; i < rank; ++i) {
    found.shape.push_back({sizes[i], symbols[i] == nullptr ? "" : symbols[i]});
  }
  return found;
}

std::int64_t attribute(OrtShapeInferContext* context, const char* name) {
  const OrtOpAttr* found = nullptr;
  check(ort().ShapeInferContext_GetAttribute(context, name, &found));
  std::int64_t value = 0;
  std::size_t size = 0;
  check(ort().ReadOpAttr(found, ORT_OP_ATTR_INT, &value, sizeof(value), &size));
  return value;
}

void set(OrtShapeInferContext* context, std::size_t index, ONNXTensorElementDataType type,
         const std::vector<Dimension>& shape) {
  std::vector<std::int64_t> sizes;
  std::vector<const char*> symbols;
  for (const Dimension& dimension : shape) {
    sizes.push_back(dimension.size);
    symbols.push_back(dimension.symbol.c_str());
  }
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(ort().CreateTensorTypeAndShapeInfo(&info));
  OrtStatus* status = ort().SetTensorElementType(info, type);
  if (status == nullptr) {
    status = ort().SetDimensions(info, sizes.data(), sizes.size());
  }
  if (status == nullptr) {
    status = ort().SetSymbolicDimensions(info, symbols.data(), symbols.size());
  }
  if (status == nullptr) {
    status = ort().ShapeInferContext_SetOutputTypeShape(context, index, info);
  }
  ort().ReleaseTensorTypeAndShapeInfo(info);
  check(status);
}

}  // namespace

void infer(const Definition& definition, OrtShapeInferContext* context) {
  const Known x = known(context, 0);
  if (x.shape.empty()) {
    return;  // of unknown rank: what follows would read as a scalar
  }
  std::vector<Dimension> shape = x.shape;
  if (definition.result_type) {
    const Known weight = known(context, 2);
    if (weight.shape.size() == 2) {
      shape.back() = weight.shape[0];
      set(context, 0, static_cast<ONNXTensorElementDataType>(attribute(context, "dtype")), shape);
    }
    return;
  }
  if (definition.kind == std::string("Activation") && attribute(context, "packed") != 0) {
    shape.back().symbol.clear();
    shape.back().size = shape.back().size > 0 ? shape.back().size / 2 : -1;
  }
  std::vector<Dimension> column = shape;
  column.back() = {1, ""};
  for (int i = 0; i < definition.output_count; ++i) {
    switch (definition.outputs[i].type) {
      case Type::kInt8:
        set(context, i, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, shape);
        break;
      case Type::kFp8:
        set(context, i, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT8E4M3FN, shape);
        break;
      case Type::kFloat32:
        set(context, i, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, column);
        break;
      case Type::kT:
        set(context, i, x.type, shape);
        break;
    }
  }
}

}  // namespace qcompile
