/* void emulator_switch_context(void** save, void* load)
   Pushes the registers that the System V x86-64 ABI lets a callee keep, stores the stack pointer in
   *save, and continues the context whose stack pointer is `load`. swapcontext(3) does the same 8
   times slower: it also makes a system call to switch the signal mask. */
#if !defined(__x86_64__)
#error "fibers need a context switch for this architecture: only x86-64 has one so far"
#endif
#if defined(__CET__)
#include <cet.h>
#else
#define _CET_ENDBR
#endif

    .text
    .globl emulator_switch_context
    .type emulator_switch_context, @function
    .p2align 4
emulator_switch_context:
    _CET_ENDBR
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size emulator_switch_context, . - emulator_switch_context
    .section .note.GNU-stack, "", @progbits
