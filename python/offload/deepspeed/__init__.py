"""Drop-in for scripts written for DeepSpeed: `import offload.deepspeed as deepspeed`."""
