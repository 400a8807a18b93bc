// Functions of a whole vector, to about one unit in the last place.
#pragma once
#include "vec.h"

namespace pyfinetune {
namespace PYFINETUNE_ISA {
namespace {

// e^x. Underflows to zero, overflows to infinity, NaN stays NaN.
//
// x = n ln 2 + r with |r| <= ln 2 / 2, ln 2 in two parts so that r is exact; e^r by a polynomial of degree 6 (the
// coefficients are those of Cephes' expf).
inline Vec vexp(Vec x) {
  x = vmax(vset(-104.0f), vmin(vset(89.0f), x));  // in this order NaN passes through both
  const Vec n = vround(vmul(x, vset(1.44269504088896341f)));
  Vec r = vfma(n, vset(-0.693359375f), x);
  r = vfma(n, vset(2.12194440e-4f), r);
  Vec p = vset(1.9875691500e-4f);
  p = vfma(p, r, vset(1.3981999507e-3f));
  p = vfma(p, r, vset(8.3334519073e-3f));
  p = vfma(p, r, vset(4.1665795894e-2f));
  p = vfma(p, r, vset(1.6666665459e-1f));
  p = vfma(p, r, vset(5.0000001201e-1f));
  return vscale2(vfma(vmul(r, r), p, vadd(r, vset(1.0f))), n);
}

// 1 / (1 + e^-x), without cancellation at either end.
inline Vec vsigmoid(Vec x) { return vdiv(vset(1.0f), vadd(vset(1.0f), vexp(vsub(vzero(), x)))); }

// With t = e^2|x| - 1, made without cancellation: tanh |x| = t / (t + 2), or 1 - 2 / (t + 2) where that rounds less.
inline Vec vtanh(Vec x) {
  const Vec size = vmax(vsub(vzero(), x), x), edge = vsub(vset(0.55f), size), one = vset(1.0f), two = vset(2.0f);
  const Vec y = vmin(vset(20.0f), vadd(size, size));  // in this order NaN passes through
  const Vec n = vround(vmul(y, vset(1.44269504088896341f)));
  Vec r = vfma(n, vset(-0.693359375f), y);
  r = vfma(n, vset(2.12194440e-4f), r);
  Vec p = vset(1.9875691500e-4f);
  p = vfma(p, r, vset(1.3981999507e-3f));
  p = vfma(p, r, vset(8.3334519073e-3f));
  p = vfma(p, r, vset(4.1665795894e-2f));
  p = vfma(p, r, vset(1.6666665459e-1f));
  p = vfma(p, r, vset(5.0000001201e-1f));
  const Vec power = vscale2(one, n);
  const Vec t = vfma(power, vfma(vmul(r, r), p, r), vsub(power, one));
  const Vec part = vdiv(vselect_negative(edge, two, t), vadd(t, two));
  const Vec result = vselect_negative(edge, vsub(one, part), part);
  return vselect_negative(x, vsub(vzero(), result), result);
}

}  // namespace
}  // namespace PYFINETUNE_ISA
}  // namespace pyfinetune
