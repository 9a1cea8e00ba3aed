//! Products with constant matrices as an operator of tract's: `activation(x · W + bias)`, `W` in 4, 8 or 32 bits.

use std::fmt;
use std::sync::Arc;

use tract_onnx::Onnx;
use tract_onnx::model::ParsingContext;
use tract_onnx::pb::tensor_proto::DataType as OnnxType;
use tract_onnx::pb::{NodeProto, TensorProto};
use tract_onnx::prelude::*;
use tract_onnx::tract_hir::internal::*;

use crate::kernels::{Activation, Layout, Matrix, Weights};

/// Name of the operator in the graphs that the engine gives to tract; no file holds it.
pub(in crate::engine) const OPERATOR: &str = "UnimoLinear";

/// Makes the operator known.
pub(super) fn register(onnx: &mut Onnx) {
    onnx.op_register.insert(OPERATOR, build);
}

/// Reads the attributes `weight` (`[inputs, outputs]`, or `[outputs, inputs]` with `transposed`; of 4 bits `[outputs, inputs / 2]` bytes),
/// `scales` (of weights of 8 and 4 bits), `integers` (such weights are multiplied as such), `bias` and `gelu`.
fn build(_: &ParsingContext, node: &NodeProto) -> TractResult<(Box<dyn InferenceOp>, Vec<String>)> {
    let attribute = |name: &str| node.attribute.iter().find(|attribute| attribute.name == name);
    let tensor = |name: &str| attribute(name).and_then(|attribute| attribute.t.as_ref());
    let flag = |name: &str| attribute(name).is_some_and(|attribute| attribute.i == 1);
    let weight = tensor("weight").context("a linear operator without a weight")?;
    let &[rows, columns] = weight.dims.as_slice() else { bail!("a weight of {} dimensions", weight.dims.len()) };
    let (rows, columns) = (usize::try_from(rows)?, usize::try_from(columns)?);
    let four = weight.data_type == OnnxType::Uint8 as i32;
    let shape = match (four, flag("transposed")) {
        (true, _) => [2 * columns, rows],
        (false, true) => [columns, rows],
        (false, false) => [rows, columns],
    };
    let (levels, scales, values);
    let weights = if four {
        scales = floats(tensor("scales").context("4-bit weights without scales")?);
        let levels = weight.raw_data.as_slice();
        if flag("integers") { Weights::FourBitIntegers(levels, &scales) } else { Weights::I4(levels, &scales) }
    } else if weight.data_type == OnnxType::Int8 as i32 {
        levels = weight.raw_data.iter().map(|byte| byte.cast_signed()).collect::<Vec<i8>>();
        scales = floats(tensor("scales").context("8-bit weights without scales")?);
        if flag("integers") { Weights::Integers(&levels, &scales) } else { Weights::I8(&levels, &scales) }
    } else {
        values = floats(weight);
        Weights::F32(&values)
    };
    let bias = tensor("bias").map(floats);
    let matrix = Matrix::new(weights, shape, flag("transposed"), bias.as_deref()).context("weights of another size")?;
    let activation = if flag("gelu") { Activation::Gelu } else { Activation::None };
    Ok((expand(Linear { matrix: Arc::new(matrix), activation }), vec![]))
}

/// The floats that an attribute holds.
pub(super) fn floats(tensor: &TensorProto) -> Vec<f32> {
    tensor.raw_data.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
}

#[derive(Clone)]
struct Linear {
    matrix: Arc<Matrix>,
    activation: Activation,
}

impl fmt::Debug for Linear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Linear [{}, {}] {:?}", self.matrix.inputs(), self.matrix.outputs(), self.activation)
    }
}

impl PartialEq for Linear {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.matrix, &other.matrix) && self.activation == other.activation
    }
}

impl Eq for Linear {}

impl Linear {
    fn shape(&self, input: &[TDim]) -> TractResult<TVec<TDim>> {
        let mut shape: TVec<TDim> = input.into();
        let last = shape.last_mut().context("a product with a scalar")?;
        ensure!(*last == self.matrix.inputs().to_dim(), "{last} values a row, {} expected", self.matrix.inputs());
        *last = self.matrix.outputs().to_dim();
        Ok(shape)
    }
}

impl Expansion for Linear {
    fn name(&self) -> StaticName {
        OPERATOR.into()
    }

    fn rules<'r, 'p: 'r, 's: 'r>(
        &'s self,
        solver: &mut Solver<'r>,
        inputs: &'p [TensorProxy],
        outputs: &'p [TensorProxy],
    ) -> InferenceResult {
        check_input_arity(inputs, 1)?;
        check_output_arity(outputs, 1)?;
        solver.equals(&inputs[0].datum_type, f32::datum_type())?;
        solver.equals(&outputs[0].datum_type, f32::datum_type())?;
        solver.given(&inputs[0].shape, move |solver, shape| solver.equals(&outputs[0].shape, self.shape(&shape)?))
    }

    fn wire(&self, prefix: &str, model: &mut TypedModel, inputs: &[OutletId]) -> TractResult<TVec<OutletId>> {
        model.wire_node(prefix, self.clone(), inputs)
    }
}

impl Op for Linear {
    fn name(&self) -> StaticName {
        OPERATOR.into()
    }

    op_as_typed_op!();
}

impl EvalOp for Linear {
    op_out_of_plan!();

    fn eval(&self, _: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let input = args_1!(inputs);
        let (inputs, outputs) = (self.matrix.inputs(), self.matrix.outputs());
        let view = input.try_as_plain_ram()?;
        let x = view.as_slice::<f32>()?;
        let rows = x.len() / inputs;
        let mut shape: TVec<usize> = input.shape().into();
        *shape.last_mut().context("a product with a scalar")? = outputs;
        let mut output = Tensor::zero::<f32>(&shape)?;
        let mut view = output.try_as_plain_ram_mut()?;
        let y = (view.as_slice_mut::<f32>()?, Layout::dense(outputs));
        self.matrix.multiply_shared(rows, (x, Layout::dense(inputs)), self.activation, y);
        Ok(tvec!(output.into_tvalue()))
    }
}

impl TypedOp for Linear {
    as_op!();

    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        Ok(tvec!(f32::fact(self.shape(&inputs[0].shape.to_tvec())?)))
    }
}
