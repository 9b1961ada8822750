package main

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/rekeyhq/rekey/integration/store"
	"github.com/rekeyhq/rekey/internal/api"
	"github.com/rekeyhq/rekey/internal/credential"
)

func newGetCommand(a *app) *cobra.Command {
	c := &cobra.Command{
		Use:   "get ID",
		Short: "Show where a credential is read; the secret only with --reveal",
		Long: `Show a credential's generation, version and store reference, from the server.

With --reveal the current secret is read from the store itself, with your own access to it, as an application would: it never
passes through the server. The store is the one that the configuration names for the credential.`,
		Example: `  rekey get orders/db
  rekey get orders/db --reveal
  rekey get orders/db --reveal --field dsn`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeIDs,
	}
	reveal := c.Flags().Bool("reveal", false, "read the secret from the store and print it")
	field := c.Flags().String("field", "", "with --reveal: print only this field, without a newline")
	c.RunE = func(cmd *cobra.Command, args []string) error {
		id, err := credential.ParseID(args[0])
		if err != nil {
			return &exit{exitUsage, err}
		}
		if *reveal {
			return a.reveal(cmd, id, *field)
		}
		if *field != "" {
			return &exit{exitUsage, errors.New("--field needs --reveal")}
		}
		client, err := a.client()
		if err != nil {
			return err
		}
		v, err := client.Get(cmd.Context(), id)
		if err != nil {
			return err
		}
		return a.print(v, func(w io.Writer) error { return showReference(w, v) })
	}
	return c
}

func showReference(w io.Writer, v api.Credential) error {
	version := "none yet"
	if v.Current != nil {
		version = string(v.Current.ID)
	}
	_, err := fmt.Fprintf(w, "credential  %s\nstate       %s\ngeneration  %d\nversion     %s\nstore       %s\nreference   %s\n",
		v.ID, v.State, v.Generation, version, v.Store, v.Reference)
	return err
}

// revealed is the JSON form of --reveal.
type revealed struct {
	Credential string            `json:"credential"`
	Generation uint64            `json:"generation"`
	Version    string            `json:"version"`
	Fields     map[string]string `json:"fields"`
}

func (a *app) reveal(cmd *cobra.Command, id credential.ID, field string) error {
	cfg, err := a.loadConfig("")
	if err != nil {
		return err
	}
	spec, ok := cfg.Credentials[id]
	if !ok {
		return &exit{exitNotFound, fmt.Errorf("credential %s is not in %s, which names its store", id, a.configPath)}
	}
	c := cfg.Stores[spec.Store]
	r, err := storeKinds()[c.Kind].read(c.Fields)
	if err != nil {
		return fmt.Errorf("store %s: %w", spec.Store, err)
	}
	s, err := r.Get(cmd.Context(), string(id), store.Current)
	if errors.Is(err, store.ErrNotFound) {
		return &exit{exitNotFound, fmt.Errorf("store %s holds no current secret for %s yet: see `rekey status %s`", spec.Store, id, id)}
	}
	if err != nil {
		return fmt.Errorf("store %s: %w", spec.Store, err)
	}
	if field != "" {
		if !slices.Contains(s.Material.Names(), field) {
			return &exit{exitNotFound, fmt.Errorf("the secret has no field %q; it has %v", field, s.Material.Names())}
		}
		_, err := a.stdout.Write(s.Material.Reveal(field))
		return err
	}
	out := revealed{string(id), s.Key.Generation, string(s.Key.Version), map[string]string{}}
	for name, value := range s.Material.RevealAll() {
		if !utf8.Valid(value) {
			return fmt.Errorf("field %s is binary: use --field %s", name, name)
		}
		out.Fields[name] = string(value)
	}
	return a.print(out, func(w io.Writer) error {
		for _, name := range slices.Sorted(maps.Keys(out.Fields)) {
			if _, err := fmt.Fprintf(w, "%-10s %s\n", name, out.Fields[name]); err != nil {
				return err
			}
		}
		return nil
	})
}
