// Types and shapes of outputs, when a model is loaded.
#pragma once

#include "ort.h"
#include "schema.h"

namespace qcompile {

void infer(const Definition& definition, OrtShapeInferContext* context);

}  // namespace qcompile
