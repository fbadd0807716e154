/* What llama.cpp uses of OpenBLAS's header, for its build with the library of this crate. */
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { CblasRowMajor = 101, CblasColMajor = 102 } CBLAS_ORDER;
typedef enum { CblasNoTrans = 111, CblasTrans = 112, CblasConjTrans = 113 } CBLAS_TRANSPOSE;

enum { OPENBLAS_SEQUENTIAL = 0, OPENBLAS_THREAD = 1, OPENBLAS_OPENMP = 2 };

void cblas_sgemm(CBLAS_ORDER order, CBLAS_TRANSPOSE trans_a, CBLAS_TRANSPOSE trans_b,
                 int m, int n, int k,
                 float alpha, const float *a, int lda, const float *b, int ldb,
                 float beta, float *c, int ldc);
int openblas_get_parallel(void);
void openblas_set_num_threads(int num_threads);

#ifdef __cplusplus
}
#endif
