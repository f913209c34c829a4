"""What a run leaves behind: its folder, pictures, report, comparison and exports."""
