//! [Operators of ours](super::super::operators) as those of tract's.

use std::sync::Arc;

use tract_onnx::Onnx;
use tract_onnx::model::ParsingContext;
use tract_onnx::pb::NodeProto;
use tract_onnx::prelude::*;
use tract_onnx::tract_hir::internal::*;

use crate::engine::operators::{NAMES, Operator, View, operator};

/// Makes all of them known.
pub(super) fn register(onnx: &mut Onnx) {
    for name in NAMES {
        onnx.op_register.insert(name, build);
    }
}

fn build(_: &ParsingContext, node: &NodeProto) -> TractResult<(Box<dyn InferenceOp>, Vec<String>)> {
    let operator = operator(node).with_context(|| format!("no operator {}", node.op_type))?;
    let operator = operator.map_err(|reason| format_err!("{reason}"))?;
    Ok((expand(Ours { name: node.op_type.clone(), operator }), vec![]))
}

#[derive(Debug, Clone)]
struct Ours {
    name: String,
    operator: Arc<dyn Operator>,
}

impl PartialEq for Ours {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.operator, &other.operator)
    }
}

impl Eq for Ours {}

impl Ours {
    /// The output's shape; all sizes are known, those of inputs being fixed.
    fn shape(&self, inputs: &[&[TDim]]) -> TractResult<TVec<TDim>> {
        let sizes = |shape: &&[TDim]| shape.iter().map(TDim::to_usize).collect::<Result<Vec<usize>, _>>();
        let sizes = inputs.iter().map(sizes).collect::<Result<Vec<_>, _>>()?;
        let shape = self.operator.shape(&sizes.iter().map(Vec::as_slice).collect::<Vec<_>>());
        Ok(shape.map_err(|reason| format_err!("{reason}"))?.iter().map(ToDim::to_dim).collect())
    }
}

impl Expansion for Ours {
    fn name(&self) -> StaticName {
        self.name.clone().into()
    }

    fn rules<'r, 'p: 'r, 's: 'r>(
        &'s self,
        solver: &mut Solver<'r>,
        inputs: &'p [TensorProxy],
        outputs: &'p [TensorProxy],
    ) -> InferenceResult {
        check_output_arity(outputs, 1)?;
        for tensor in inputs.iter().chain(outputs) {
            solver.equals(&tensor.datum_type, f32::datum_type())?;
        }
        let shapes = inputs.iter().map(|input| &input.shape);
        solver.given_all(shapes, move |solver, shapes: Vec<TVec<TDim>>| {
            solver.equals(&outputs[0].shape, self.shape(&shapes.iter().map(|shape| &**shape).collect::<Vec<_>>())?)
        })
    }

    fn wire(&self, prefix: &str, model: &mut TypedModel, inputs: &[OutletId]) -> TractResult<TVec<OutletId>> {
        model.wire_node(prefix, self.clone(), inputs)
    }
}

impl Op for Ours {
    fn name(&self) -> StaticName {
        self.name.clone().into()
    }

    op_as_typed_op!();
}

impl EvalOp for Ours {
    op_out_of_plan!();

    fn eval(&self, _: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let plain = inputs.iter().map(|input| input.try_as_plain_ram()).collect::<TractResult<TVec<_>>>()?;
        let views = inputs.iter().zip(&plain).map(|(input, plain)| {
            let values = plain.as_slice::<f32>()?;
            TractResult::Ok(View { shape: input.shape(), values })
        });
        let views = views.collect::<TractResult<TVec<View>>>()?;
        let shapes: TVec<&[usize]> = views.iter().map(|view| view.shape).collect();
        let refused = |reason: String| format_err!("{reason}");
        let mut output = Tensor::zero::<f32>(&self.operator.shape(&shapes).map_err(refused)?)?;
        let mut plain = output.try_as_plain_ram_mut()?;
        self.operator.compute(&views, plain.as_slice_mut::<f32>()?).map_err(refused)?;
        Ok(tvec!(output.into_tvalue()))
    }
}

impl TypedOp for Ours {
    as_op!();

    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        let shapes: TVec<TVec<TDim>> = inputs.iter().map(|input| input.shape.to_tvec()).collect();
        Ok(tvec!(f32::fact(self.shape(&shapes.iter().map(|shape| &**shape).collect::<Vec<_>>())?)))
    }
}
