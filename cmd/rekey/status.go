package main

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/rekeyhq/rekey/internal/api"
)

func newStatusCommand(a *app) *cobra.Command {
	c := &cobra.Command{
		Use:   "status [ID]",
		Short: "Show every credential, or one in full",
		Long: `Show every credential, or one in full. STATE is the word to read first:

  ok         waits for its next rotation, or is being rotated
  retrying   the last step failed; it is tried again
  parked     waits for you: the reason is below the line; then rekey resume
  overdue    older than its calendar allows
  held       its overlap is kept open by hand
  paused     no step starts until rekey resume
  unmanaged  it left the configuration; it works and does not rotate
  replacing  an emergency: a new version is made, then the old one ends at once
  killing    an emergency: every version is being disabled
  suspended  an emergency has disabled every version: rekey restore`,
		Example: `  rekey status
  rekey status --state parked,overdue
  rekey status orders/db
  rekey status --output json | jq -r '.[].id'`,
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: a.completeOneID,
	}
	var f api.Filter
	c.Flags().StringVar(&f.Team, "team", "", "only this team's")
	c.Flags().StringVar(&f.Target, "target", "", "only those at this target")
	c.Flags().StringVar(&f.Owner, "owner", "", "only this owner's")
	c.Flags().StringVar(&f.Environment, "environment", "", "only those of this environment")
	c.Flags().StringVar(&f.State, "state", "", "only those in these states, joined by commas")
	c.RunE = func(cmd *cobra.Command, args []string) error {
		ids, err := parseIDs(args)
		if err != nil {
			return err
		}
		client, err := a.client()
		if err != nil {
			return err
		}
		if len(ids) == 1 {
			v, err := client.Get(cmd.Context(), ids[0])
			if err != nil {
				return err
			}
			return a.print(v, func(w io.Writer) error { return a.showCredential(w, v) })
		}
		list, err := client.List(cmd.Context(), f)
		if err != nil {
			return err
		}
		if c, err := client.Control(cmd.Context()); err == nil && c.Paused {
			fmt.Fprintf(a.stderr, "the whole fleet was paused by %s %s%s: rekey resume --all\n", c.Actor, until(c.At, a.now()), because(c.Reason))
		}
		return a.print(list, func(w io.Writer) error { return a.showList(w, list, f) })
	}
	return c
}

func (a *app) showList(w io.Writer, list []api.Credential, f api.Filter) error {
	now := a.now()
	if len(list) == 0 {
		text := "no credentials yet: declare some in the configuration, then `rekey apply`"
		if f != (api.Filter{}) {
			text = "no credential fits"
		}
		_, err := fmt.Fprintln(w, text)
		return err
	}
	var rows [][]string
	for _, v := range list {
		age, next := "", until(v.NextRotation, now)
		if v.AgeSeconds > 0 {
			age = span(seconds(v.AgeSeconds))
		}
		switch {
		case !v.OverlapUntil.IsZero():
			next = "overlap " + until(v.OverlapUntil, now)
		case v.Phase != "idle":
			next = v.Phase
		case v.State == "unmanaged":
			next = ""
		}
		rows = append(rows, []string{v.ID, v.State, strconv.FormatUint(v.Generation, 10), dash(age), dash(next), v.Target})
	}
	if err := table(w, []string{"CREDENTIAL", "STATE", "GEN", "AGE", "NEXT", "TARGET"}, rows); err != nil {
		return err
	}
	for _, v := range list {
		if why := trouble(v); why != "" {
			if _, err := fmt.Fprintf(w, "\n%s is %s: %s\n", v.ID, v.State, why); err != nil {
				return err
			}
		}
	}
	return nil
}

func because(reason string) string {
	if reason == "" {
		return ""
	}
	return " (" + reason + ")"
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// trouble says why a credential needs a look, and what to do.
func trouble(v api.Credential) string {
	switch {
	case v.Parked != nil:
		return v.Parked.Message + "\n  when that is mended: rekey resume " + v.ID
	case v.State == "suspended":
		return "an emergency has disabled every version\n  to make a new one: rekey restore " + v.ID
	case v.Failure != nil:
		return v.Failure.Message
	}
	return ""
}

func (a *app) showCredential(w io.Writer, v api.Credential) error {
	now := a.now()
	state := v.State
	if !v.Managed && state != "unmanaged" {
		state += " (unmanaged)"
	}
	overlap := instant(v.OverlapUntil, now)
	if v.Hold {
		overlap = "held open"
	}
	age := ""
	if v.AgeSeconds > 0 {
		age = span(seconds(v.AgeSeconds))
	}
	every := v.Every
	if every == "0s" {
		every = "on request only"
	}
	pairs := [][2]string{
		{"credential", v.ID},
		{"state", state},
		{"phase", v.Phase + " (since " + until(v.Since, now) + ")"},
		{"purpose", v.Purpose},
		{"owner", v.Owner},
		{"environment", v.Environment},
		{"target", v.Target + " (" + v.Kind + ", plan " + v.Plan + ")"},
		{"store", v.Store},
		{"reference", v.Reference},
		{"generation", strconv.FormatUint(v.Generation, 10)},
		{"current", shownVersion(v.Current)},
		{"old", shownVersion(v.Old)},
		{"candidate", shownVersion(v.Candidate)},
		{"age", age},
		{"every", every},
		{"last rotation", instant(v.LastRotation, now)},
		{"next rotation", instant(v.NextRotation, now)},
		{"overlap until", overlap},
		{"waits for", strings.Join(v.Lagging, ", ")},
		{"worked on by", v.Worker},
		{"next try", instant(v.RetryAt, now)},
		{"foreign", strings.Join(v.Foreign, ", ")},
	}
	if e := v.Emergency; e != nil {
		pairs = append(pairs, [2]string{"emergency", fmt.Sprintf("%s by %s, incident %s, %s", e.Mode, e.Actor, e.Incident, until(e.At, now))}, [2]string{"reason", e.Reason})
		if e.Mode == "kill" {
			pairs = append(pairs, [2]string{"proven dead", map[bool]string{true: "yes", false: "not yet, or not provable"}[v.Proven]})
		}
	}
	pairs = append(pairs, [2]string{"residual", v.Residual})
	if v.Failure != nil && v.Parked == nil {
		pairs = append(pairs, [2]string{"last failure", fmt.Sprintf("%s (%s, %d tries, %s)", v.Failure.Message, v.Failure.Class, v.Attempt, until(v.Failure.At, now))})
	}
	if v.Parked != nil {
		pairs = append(pairs, [2]string{"parked", fmt.Sprintf("%s (%s in %s, %s)", v.Parked.Message, v.Parked.Class, v.Parked.Phase, until(v.Parked.At, now))},
			[2]string{"", ""}, [2]string{"to go on", "mend that, then rekey resume " + v.ID})
	}
	return fields(w, pairs)
}

func shownVersion(v *api.Version) string {
	if v == nil {
		return ""
	}
	id := v.ID
	if id == "" {
		id = "(not chosen yet)"
	}
	return fmt.Sprintf("%s, generation %d", id, v.Generation)
}

func newTargetsCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "targets",
		Short: "List the issuers that hold credentials",
		Long:  "List the targets: the issuers that hold credentials, how many there are at each, and how many of them wait for a human.",
		Example: `  rekey targets
  rekey targets --output json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := a.client()
			if err != nil {
				return err
			}
			list, err := client.Targets(cmd.Context())
			if err != nil {
				return err
			}
			return a.print(list, func(w io.Writer) error {
				var rows [][]string
				for _, t := range list {
					rows = append(rows, []string{t.Name, t.Kind, t.Environment, t.Owner, strconv.Itoa(t.Concurrency), strconv.Itoa(t.Credentials), strconv.Itoa(t.Parked)})
				}
				return table(w, []string{"TARGET", "KIND", "ENVIRONMENT", "OWNER", "LIMIT", "CREDENTIALS", "PARKED"}, rows)
			})
		},
	}
}

func newVersionCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Show the program's version",
		Long:    "Show the program's version. It asks no server.",
		Example: "  rekey version\n  rekey version --output json",
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return a.print(map[string]string{"version": version()}, func(w io.Writer) error {
				_, err := fmt.Fprintln(w, "rekey", version())
				return err
			})
		},
	}
}
