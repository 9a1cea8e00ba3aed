//! AdamW over all tensors at once: two kernels for the gradient's norm and one for the update, whatever the number of tensors.

use candle_core::{CpuStorage, CudaStorage, Device, InplaceOp1, Layout, Result, Shape, Tensor, Var};
use std::sync::atomic::{AtomicU64, Ordering};

use super::machine::{Address, Grid, Kernel, Machine, arguments};
use crate::ops::kernels::AdamWStep;

/// Values of a piece: what one block updates.
const PIECE: usize = 1 << 14;

/// Where a tensor's values begin. Asked for as by an operator that writes them, because the update does.
struct Locate(AtomicU64);

impl InplaceOp1 for Locate {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (CpuStorage::F32(values), Some((start, _))) = (storage, layout.contiguous_offsets()) else {
            candle_core::bail!("adamw: expected contiguous f32");
        };
        self.0.store(values[start..].as_mut_ptr() as u64, Ordering::Relaxed);
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        let place = super::nvidia::Nvidia::new(&storage.device).input("adamw", storage, layout)?;
        self.0.store(place.at.0, Ordering::Relaxed);
        Ok(())
    }

    #[cfg(not(feature = "cuda"))]
    fn cuda_fwd(&self, _storage: &mut CudaStorage, _layout: &Layout) -> Result<()> {
        Err(candle_core::Error::NotCompiledWithCudaSupport)
    }
}

fn locate(tensor: &Tensor) -> Result<Address> {
    let locate = Locate(AtomicU64::new(0));
    tensor.inplace_op1(&locate)?;
    Ok(Address(locate.0.into_inner()))
}

/// A tensor to be updated.
pub struct Tuned<'a> {
    /// Weights.
    pub weights: &'a Var,
    /// First moment, of the weights' shape.
    pub first: &'a Tensor,
    /// Second moment.
    pub second: &'a Tensor,
    /// Gradient, contiguous.
    pub gradient: &'a Tensor,
    /// Learning rate.
    pub rate: f32,
    /// Decoupled weight decay.
    pub decay: f32,
}

/// An update of all tensors at once.
pub struct DeviceAdamW<'a> {
    /// What is updated.
    pub tensors: Vec<Tuned<'a>>,
    /// Largest global norm of the gradient.
    pub clip_norm: f32,
    /// Number of updates so far, and room for two values more, `[3]`; counted on.
    pub progress: &'a Tensor,
    /// Decays and eps; rate, decay and scale of the gradient are each tensor's own, or found on the device, as corrections are.
    pub step: AdamWStep,
}

impl DeviceAdamW<'_> {
    /// Updates the weights and moments, unless the gradient is not finite, and gives the gradient's global norm, `[1]`. The host does
    /// not wait.
    ///
    /// # Errors
    /// Tensors elsewhere than on `device`, and those of candle.
    pub fn update(&self, device: &Device) -> Result<Tensor> {
        match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(cuda) => self.launch(&super::nvidia::Nvidia::new(cuda)),
            #[cfg(test)]
            Device::Cpu => self.launch(&super::emulation::Emulated::on_this_thread()),
            other => candle_core::bail!("adamw: no kernels for {other:?}"),
        }
    }

    fn launch<M: Machine>(&self, machine: &M) -> Result<Tensor> {
        let mut pieces = Vec::new();
        let mut count = 0;
        for tensor in &self.tensors {
            let places = [tensor.weights.as_tensor(), tensor.first, tensor.second, tensor.gradient].map(locate);
            let [weights, first, second, gradient] = places;
            let places = [weights?, first?, second?, gradient?];
            let values = tensor.weights.elem_count();
            for start in (0..values).step_by(PIECE) {
                for place in places {
                    let Address(at) = place.after(start);
                    pieces.extend([at as u32, (at >> 32) as u32]);
                }
                pieces.extend([PIECE.min(values - start) as u32, tensor.rate.to_bits(), tensor.decay.to_bits(), 0]);
                count += 1;
            }
        }
        let (table, sums, norm) = (machine.upload(&pieces)?, machine.allocate(count)?, machine.allocate(1)?);
        let (table_at, sums_at, norm_at) = (machine.words_at(&table), machine.at(&sums), machine.at(&norm));
        let (progress_at, AdamWStep { beta1, beta2, eps, .. }) = (locate(self.progress)?, self.step);
        if count > 0 {
            machine.launch(Kernel("adamw", "square_sums"), Grid::reducing(count), arguments![table_at, sums_at])?;
        }
        let arguments = arguments![sums_at, norm_at, progress_at, count as u32, beta1, beta2];
        machine.launch(Kernel("adamw", "root_of_sum"), Grid::reducing(1), arguments)?;
        if count > 0 {
            let arguments = arguments![table_at, norm_at, progress_at, self.clip_norm, beta1, beta2, eps];
            machine.launch(Kernel("adamw", "adamw"), Grid::reducing(count), arguments)?;
        }
        machine.tensor(norm, &Shape::from(1))
    }
}
