package main

import (
	"bytes"
	"flag"
	"os"
	"testing"

	"github.com/rekeyhq/rekey/internal/config"
)

//go:generate go test . -run ^TestConfigurationReference$ -update-reference

var updateReference = flag.Bool("update-reference", false, "write the configuration's reference and schema instead of comparing")

// The schema and the reference page show what this program really accepts, so they are made here, where the kinds are known.
func TestConfigurationReference(t *testing.T) {
	for file, make := range map[string]func(config.Kinds) ([]byte, error){
		"../../internal/config/REFERENCE.md": config.Markdown,
		"../../internal/config/schema.json":  config.Schema,
	} {
		got, err := make(kinds())
		if err != nil {
			t.Fatal(err)
		}
		if *updateReference {
			if err := os.WriteFile(file, got, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s is not up to date: run `task generate`", file)
		}
	}
}

// What `rekey init` writes is valid with the real kinds.
func TestTemplateIsValid(t *testing.T) {
	if _, err := config.Parse("/etc/rekey/rekey.yaml", config.Template(), kinds()); err != nil {
		t.Error(err)
	}
}
