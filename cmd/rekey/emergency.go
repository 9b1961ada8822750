package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	"github.com/rekeyhq/rekey/internal/api"
	"github.com/rekeyhq/rekey/internal/credential"
)

func newKillCommand(a *app) *cobra.Command {
	return a.emergency(credential.ModeKill, "Emergency: disable every version of a credential at once",
		`Disable every version of a credential at the issuer and end its sessions, at once and whatever is in flight. Applications that use it
STOP WORKING until `+"`rekey restore`"+`. To change it without an outage longer than a rotation, see rekey replace.

The order is durable when this command returns; it survives crashes of every part. --wait watches until the issuer has confirmed that
every version is disabled and the proof by login was made or found impossible. Versions that rekey did not make are reported,
not touched.

On a terminal it asks; elsewhere it wants --yes.`,
		`  rekey kill orders/db --reason "password in a public log" --wait
  rekey kill orders/db --reason "leak" --yes --incident inc-2031`,
		"Every version of %s stops working at once, and applications with it, until `rekey restore`.")
}

func newReplaceCommand(a *app) *cobra.Command {
	return a.emergency(credential.ModeReplace, "Emergency: make a new version, then end the old one with no overlap",
		`Make and publish a new version, then end the old one at once, without an overlap. Applications must read the store again; sessions on
the old version end. An overlap that is open is ended first.

The order is durable when this command returns. --wait watches until the old version is proven dead.

On a terminal it asks; elsewhere it wants --yes.`,
		`  rekey replace orders/db --reason "laptop stolen" --wait`,
		"%s gets a new version, and the old one ends with no overlap: applications must read the store again.")
}

func (a *app) emergency(mode, short, long, example, warning string) *cobra.Command {
	c := &cobra.Command{
		Use: mode + " ID --reason TEXT", Short: short, Long: long, Example: example,
		Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeOneID,
	}
	reason := c.Flags().String("reason", "", "why, for the audit entry and the event (required)")
	yes := c.Flags().BoolP("yes", "y", false, "do not ask")
	incident := c.Flags().String("incident", "", "an `id` of your own: the same order under the same id is carried out once")
	wait := c.Flags().Bool("wait", false, "watch until it is carried out")
	timeout := c.Flags().Duration("timeout", 15*time.Minute, "with --wait: the longest wait; 0 for none")
	c.RunE = func(cmd *cobra.Command, args []string) error {
		ids, err := parseIDs(args)
		if err != nil {
			return err
		}
		if strings.TrimSpace(*reason) == "" {
			return &exit{exitUsage, fmt.Errorf("say why: rekey %s %s --reason \"…\"", mode, ids[0])}
		}
		client, err := a.client()
		if err != nil {
			return err
		}
		if err := a.confirm(*yes, fmt.Sprintf(warning, ids[0]), mode); err != nil {
			return err
		}
		if *incident == "" {
			*incident = uuid.NewString() // ours, so that a repeat after a lost answer is the same order
		}
		i, err := a.order(cmd.Context(), client, ids[0], mode, *incident, *reason)
		if err != nil {
			return err
		}
		if !*wait {
			return a.print(i, func(w io.Writer) error {
				_, err := fmt.Fprintf(w, "%s of %s is ordered, incident %s\nto watch: rekey %s %s --reason %s --incident %s --yes --wait\n",
					mode, ids[0], i.ID, mode, ids[0], shellQuoted(*reason), i.ID)
				return err
			})
		}
		return a.waitIncident(cmd.Context(), client, i, *timeout)
	}
	return c
}

// shellQuoted is s as one word of a POSIX shell, in which nothing is expanded.
func shellQuoted(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// order sends the order, again for a while if the answer is lost: it is the same one.
func (a *app) order(ctx context.Context, client *api.Client, id credential.ID, mode, incident, reason string) (api.Incident, error) {
	for try := 1; ; try++ {
		i, err := client.Order(ctx, id, mode, incident, reason)
		var answer *api.Error
		again := errors.Is(err, api.ErrUnreachable) || errors.As(err, &answer) && answer.Status >= 500
		if err == nil || !again || ctx.Err() != nil {
			return i, err
		}
		if try == 5 {
			return i, fmt.Errorf("%w\nThe order may have been taken. Repeat it with --incident %s: it is then the same one", err, incident)
		}
		fmt.Fprintf(a.stderr, "no answer, trying again: %v\n", err)
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
}

// confirm asks on a terminal, and elsewhere wants --yes.
func (a *app) confirm(yes bool, warning, verb string) error {
	if yes {
		return nil
	}
	if !isTerminal(a.stdin) {
		return &exit{exitUsage, fmt.Errorf("%s Not on a terminal: repeat with --yes", warning)}
	}
	fmt.Fprintf(a.stderr, "%s\nType %s to go on: ", warning, verb)
	line, _ := bufio.NewReader(a.stdin).ReadString('\n')
	if strings.TrimSpace(line) != verb {
		return &exit{exitError, errors.New("nothing was done")}
	}
	return nil
}

// waitIncident watches an order.
func (a *app) waitIncident(ctx context.Context, client *api.Client, i api.Incident, timeout time.Duration) error {
	goesOn := fmt.Sprintf("incident %s goes on", i.ID)
	done, err := look(ctx, a.progress(), timeout, goesOn,
		func(ctx context.Context) (api.Incident, error) { return client.Incident(ctx, i.ID) },
		func(i api.Incident) (string, bool, error) {
			text, failed := "", error(nil)
			for _, p := range i.Credentials {
				switch {
				case p.State == "parked":
					failed = fmt.Errorf("%s is parked: %s; when that is mended: rekey resume %s", p.ID, p.Problem, p.ID)
				case !p.Reached:
					text = p.ID + ": the order is on its way"
				default:
					text = fmt.Sprintf("%s: %s", p.ID, p.Phase)
				}
				if p.Problem != "" {
					text += "; " + p.Problem
				}
			}
			return text, i.Complete, failed
		})
	if err != nil {
		return err
	}
	if err := a.print(done, func(w io.Writer) error {
		for _, p := range done.Credentials {
			text := p.State
			switch {
			case p.Problem != "" && !p.Disabled:
				text = p.Problem
			case done.Mode == credential.ModeReplace && p.Proven:
				text = "replaced; the old version is proven dead"
			case done.Mode == credential.ModeReplace && p.Disabled:
				text = "replaced; the old version is gone, says the issuer; not proven by login"
			case p.Proven:
				text = "every version is disabled, and was refused at a login"
			case p.Disabled:
				text = "every version is disabled, says the issuer; not proven by login"
			}
			if p.Residual != "" {
				text += " (" + p.Residual + ")"
			}
			if _, err := fmt.Fprintf(w, "%s: %s\n", p.ID, text); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		return err
	}
	for _, p := range done.Credentials {
		if !p.Disabled {
			return &exit{exitWait, fmt.Errorf("%s: %s", p.ID, dash(p.Problem))}
		}
	}
	return nil
}
