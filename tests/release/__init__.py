"""What a release is checked with: vulnerabilities (audit), licences, bounds; and its bill of materials (make sbom)."""
