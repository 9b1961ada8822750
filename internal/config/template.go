package config

import _ "embed"

//go:embed template.yaml
var template string

// Template is the commented rekey.yaml that `rekey init` writes. It is valid once the files that it refers to exist.
func Template() []byte { return []byte(template) }
