"""What splits and models cost in time: tables, exports planned with them, and the finished model's last word."""
