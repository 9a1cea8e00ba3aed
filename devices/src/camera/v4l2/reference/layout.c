/* Sizes, offsets and request numbers of <linux/videodev2.h>, which kernel.rs declares again. Prints the table of its test.
 *   cc layout.c -o layout && ./layout
 * For 32-bit ARM: arm-linux-gnueabihf-gcc -static layout.c -o layout && qemu-arm ./layout */
#include <linux/videodev2.h>
#include <stddef.h>
#include <stdio.h>

#define SIZE(type) printf("sizeof %s %zu\n", #type, sizeof(struct type))
#define AT(type, field) printf("offsetof %s.%s %zu\n", #type, #field, offsetof(struct type, field))
#define REQUEST(name) printf("%s 0x%08lx\n", #name, (unsigned long)(unsigned int)name)

int main(void) {
    SIZE(v4l2_capability);
    AT(v4l2_capability, capabilities);
    AT(v4l2_capability, device_caps);
    SIZE(v4l2_fmtdesc);
    AT(v4l2_fmtdesc, pixelformat);
    SIZE(v4l2_frmsizeenum);
    AT(v4l2_frmsizeenum, discrete);
    AT(v4l2_frmsizeenum, stepwise.step_height);
    SIZE(v4l2_format);
    AT(v4l2_format, fmt.pix);
    AT(v4l2_format, fmt.pix.priv);
    AT(v4l2_format, fmt.pix.quantization);
    SIZE(v4l2_streamparm);
    AT(v4l2_streamparm, parm.capture.timeperframe);
    SIZE(v4l2_requestbuffers);
    SIZE(v4l2_buffer);
    AT(v4l2_buffer, timestamp);
    AT(v4l2_buffer, sequence);
    AT(v4l2_buffer, m);
    AT(v4l2_buffer, length);
    REQUEST(VIDIOC_QUERYCAP);
    REQUEST(VIDIOC_ENUM_FMT);
    REQUEST(VIDIOC_S_FMT);
    REQUEST(VIDIOC_REQBUFS);
    REQUEST(VIDIOC_QUERYBUF);
    REQUEST(VIDIOC_QBUF);
    REQUEST(VIDIOC_DQBUF);
    REQUEST(VIDIOC_STREAMON);
    REQUEST(VIDIOC_STREAMOFF);
    REQUEST(VIDIOC_S_PARM);
    REQUEST(VIDIOC_ENUM_FRAMESIZES);
    return 0;
}
