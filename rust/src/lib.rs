//! The engine of fastq.
