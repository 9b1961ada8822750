package api

import (
	"context"
	"fmt"
	"sync"

	"github.com/danielgtaylor/huma/v2"

	"github.com/rekeyhq/rekey/internal/config"
	"github.com/rekeyhq/rekey/internal/credential"
	"github.com/rekeyhq/rekey/rotators"
)

// Prober asks an issuer, without changing anything, whether a credential could be rotated there: it is reachable, lets the admin
// in, has given it the privileges, and refuses a random secret.
type Prober func(ctx context.Context, t credential.Target, id credential.ID, spec credential.Spec) ([]rotators.Finding, error)

// probesAtOnce bounds the issuers that one apply asks at the same time.
const probesAtOnce = 8

// probe asks the issuer of every credential that would be created, adopted or changed, and of every one at a changed target. What is
// fatal comes back as an error for each, the rest as warnings.
func (s *Server) probe(ctx context.Context, changes []ApplyChange, desired config.Config, records []credential.Record) (warnings []string, fatal []error) {
	if s.Probe == nil {
		return nil, nil
	}
	targets := map[string]credential.Target{}
	for _, t := range desired.Targets {
		targets[t.Name] = t
	}
	moved := map[string]bool{}
	for _, c := range changes {
		if c.Object == "target" && (c.Action == config.Create || c.Action == config.Update) {
			moved[c.ID] = true
		}
	}
	var (
		wg   sync.WaitGroup
		mu   sync.Mutex
		seat = make(chan struct{}, probesAtOnce)
	)
	for _, c := range changes {
		id := credential.ID(c.ID)
		spec, declared := desired.Credentials[id]
		for _, r := range records {
			if r.ID == id && r.Adopted != "" { // the file need not say so any more
				spec.Adopt = r.Spec.Adopt
			}
		}
		if c.Object != "credential" || !declared || c.Action == config.None && !moved[spec.Target] {
			continue
		}
		wg.Go(func() {
			seat <- struct{}{}
			defer func() { <-seat }()
			found, err := s.Probe(ctx, targets[spec.Target], id, spec)
			mu.Lock()
			defer mu.Unlock()
			at := "credentials." + string(id)
			if err != nil {
				fatal = append(fatal, &huma.ErrorDetail{Location: at, Message: "target " + spec.Target + ": " + err.Error()})
			}
			for _, f := range found {
				text := fmt.Sprintf("target %s: %s", spec.Target, f.Message)
				if f.Remedy != "" {
					text += "; " + f.Remedy
				}
				if f.Fatal {
					fatal = append(fatal, &huma.ErrorDetail{Location: at, Message: text})
				} else {
					warnings = append(warnings, at+": "+text)
				}
			}
		})
	}
	wg.Wait()
	return warnings, fatal
}
