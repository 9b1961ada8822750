package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/rekeyhq/rekey/events"
	"github.com/rekeyhq/rekey/internal/api"
	"github.com/rekeyhq/rekey/internal/credential"
)

const sinceUsage = "begin at an `instant` (RFC 3339) or an age such as 24h or 7d; all for everything that is kept"

func newEventsCommand(a *app) *cobra.Command {
	c := &cobra.Command{
		Use:   "events [FILTER...]",
		Short: "Show events, and follow them",
		Long: `Show the events of the last 24 hours, or with --follow what comes from now on. Applications receive the same events.

A FILTER is a type (rotated, revoked, rotation_failed, overlap_ending, overdue, suspended), a credential (orders/db), or a team
(orders/). Several types are alternatives. With --output json each line is one event, in CloudEvents' JSON format.`,
		Example: `  rekey events
  rekey events --follow rotated revoked
  rekey events orders/db --since 7d
  rekey events --follow --output json | jq .data`,
		ValidArgsFunction: func(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
			var types []string
			for _, t := range events.Types() {
				types = append(types, events.Short(t))
			}
			ids, d := a.completeIDs(cmd, args, prefix)
			return append(types, ids...), d
		},
	}
	follow := c.Flags().BoolP("follow", "f", false, "go on with what comes")
	since := c.Flags().String("since", "", sinceUsage)
	c.RunE = func(cmd *cobra.Command, args []string) error {
		q, err := eventQuery(args)
		if err != nil {
			return err
		}
		q.Follow, q.Since = *follow, a.since(*since, *follow)
		client, err := a.client()
		if err != nil {
			return err
		}
		if err := known(cmd.Context(), client, q.Credential); err != nil {
			return err
		}
		return a.ended(cmd.Context(), client.Events(cmd.Context(), q, func(e api.Event) error {
			if a.json() {
				return a.line(e)
			}
			_, err := fmt.Fprintln(a.stdout, printable(eventLine(e)))
			return err
		}))
	}
	return c
}

// eventQuery understands filters.
func eventQuery(args []string) (api.StreamQuery, error) {
	var q api.StreamQuery
	var errs []error
	for _, arg := range args {
		team, isTeam := strings.CutSuffix(arg, "/")
		switch {
		case isTeam && credential.ValidName(team) && q.Team == "" && q.Credential == "":
			q.Team = team
		case strings.Contains(arg, "/"):
			_, err := credential.ParseID(arg)
			if q.Credential != "" || q.Team != "" {
				err = errors.New("want one credential or one team")
			}
			errs = append(errs, err)
			q.Credential = arg
		default:
			q.Types = append(q.Types, arg) // the server knows them
		}
	}
	if err := errors.Join(errs...); err != nil {
		return q, &exit{exitUsage, err}
	}
	return q, nil
}

// known fails where a stream would be empty because there is no such credential.
func known(ctx context.Context, client *api.Client, id string) error {
	if id == "" {
		return nil
	}
	_, err := client.Get(ctx, credential.ID(id))
	return err
}

// since is where a stream begins: what the user says, else now when following, else a day ago.
func (a *app) since(said string, follow bool) string {
	switch {
	case said == "all":
		return ""
	case said != "":
		return said
	case follow:
		return a.now().UTC().Format(time.RFC3339)
	default:
		return "24h"
	}
}

// ended is the end of a stream: Ctrl-C is how a user ends one.
func (a *app) ended(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// line writes v as one line of JSON.
func (a *app) line(v any) error { return json.NewEncoder(a.stdout).Encode(v) }

func eventLine(e api.Event) string {
	d := e.Data
	parts := []string{e.Time.Local().Format("2006-01-02 15:04:05"), fmt.Sprintf("%-15s", events.Short(e.Type)), e.Subject, fmt.Sprintf("generation %d", d.Generation)}
	for _, p := range []string{d.Grade, d.Reason, d.Message} {
		if p != "" {
			parts = append(parts, p)
		}
	}
	if !d.ValidUntil.IsZero() {
		parts = append(parts, "old works until "+d.ValidUntil.Local().Format("2006-01-02 15:04:05"))
	}
	if len(d.Lagging) > 0 {
		parts = append(parts, "waits for "+strings.Join(d.Lagging, ", "))
	}
	return strings.Join(parts, "  ")
}

func newAuditCommand(a *app) *cobra.Command {
	return group("audit", "Show and verify the audit entries",
		"Show and verify the audit entries: one for every commit, chained by hash for each credential.",
		"  rekey audit list orders/db\n  rekey audit verify",
		newAuditListCommand(a), newAuditVerifyCommand(a))
}

func newAuditListCommand(a *app) *cobra.Command {
	c := &cobra.Command{
		Use:   "list [ID]",
		Short: "Show audit entries",
		Long: `Show the audit entries of one credential, everything that is kept, or of all, those of the last 24 hours. With --output json each
line is one entry, with its hash and its predecessor's, so that a copy can be verified elsewhere.`,
		Example: `  rekey audit list orders/db
  rekey audit list --since 7d --output json > audit.ndjson`,
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: a.completeOneID,
	}
	follow := c.Flags().BoolP("follow", "f", false, "go on with what comes")
	since := c.Flags().String("since", "", sinceUsage)
	c.RunE = func(cmd *cobra.Command, args []string) error {
		ids, err := parseIDs(args)
		if err != nil {
			return err
		}
		q := api.StreamQuery{Follow: *follow, Since: a.since(*since, *follow)}
		if len(ids) == 1 {
			q.Credential = args[0]
			if *since == "" && !*follow {
				q.Since = ""
			}
		}
		client, err := a.client()
		if err != nil {
			return err
		}
		if err := known(cmd.Context(), client, q.Credential); err != nil {
			return err
		}
		return a.ended(cmd.Context(), client.Audit(cmd.Context(), q, func(e api.AuditEntry) error {
			if a.json() {
				return a.line(e)
			}
			_, err := fmt.Fprintln(a.stdout, printable(entryLine(e)))
			return err
		}))
	}
	return c
}

func entryLine(e api.AuditEntry) string {
	s := fmt.Sprintf("%s  %s #%d  %s: %s", e.At.Local().Format("2006-01-02 15:04:05"), e.Credential, e.Rev, e.Actor, e.Action)
	if e.From != e.To {
		s += fmt.Sprintf(" (%s -> %s)", dash(string(e.From)), e.To)
	}
	if e.Detail != "" {
		s += ": " + e.Detail
	}
	return s
}

func newAuditVerifyCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "verify",
		Short: "Check every audit entry, record and event against each other",
		Long: `Check every audit entry, record and event against each other: no entry edited, dropped or reordered, each record at its last entry,
every announced event published exactly once, and nothing published that did not happen. Ends with code 8 if it finds anything.`,
		Example: `  rekey audit verify
  rekey audit verify --output json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := a.client()
			if err != nil {
				return err
			}
			v, err := client.Verify(cmd.Context())
			if err != nil {
				return err
			}
			if err := a.print(v, func(w io.Writer) error { return showVerified(w, v) }); err != nil {
				return err
			}
			if v.Found > 0 {
				return &exit{exitViolations, fmt.Errorf("%s found", count(v.Found, "violation"))}
			}
			return nil
		},
	}
}

func showVerified(w io.Writer, v api.VerifyResult) error {
	for _, x := range v.Violations {
		if _, err := fmt.Fprintf(w, "invariant %d: %s: %s\n", x.Invariant, x.Credential, x.Message); err != nil {
			return err
		}
	}
	if more := v.Found - len(v.Violations); more > 0 {
		if _, err := fmt.Fprintf(w, "and %d more\n", more); err != nil {
			return err
		}
	}
	text := fmt.Sprintf("%s, %d audit entries, %s: ", count(v.Credentials, "credential"), v.Entries, count(v.Events, "event"))
	if v.Found == 0 {
		text += "nothing is missing, edited or out of order"
	} else {
		text += count(v.Found, "violation")
	}
	if v.Truncated > 0 {
		text += fmt.Sprintf("\nof %s the oldest entries are past their retention and were not seen", count(v.Truncated, "credential"))
	}
	_, err := fmt.Fprintln(w, text)
	return err
}
