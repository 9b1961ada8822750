package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/rekeyhq/rekey/internal/api"
)

func newIdentityCommand(a *app) *cobra.Command {
	return group("identity", "Add, list and remove who may use the API",
		`Add, list and remove who may use the API. Each has a name, which is the actor in audit entries, a token, and scopes:

  read       see credentials, targets, events and audit entries
  rotate     rotate now
  operate    hold, rollback, pause, resume, restore
  emergency  kill, replace
  apply      change what is declared
  admin      identities
  metrics    scrape /metrics`,
		"  rekey identity add ci --scope read,apply --token-out ci.token\n  rekey identity list",
		newIdentityAddCommand(a), newIdentityListCommand(a), newIdentityRemoveCommand(a))
}

func newIdentityAddCommand(a *app) *cobra.Command {
	c := &cobra.Command{
		Use:   "add NAME --scope SCOPE",
		Short: "Add an identity",
		Long: `Add an identity. Its token is drawn here, the server learns only its hash: nobody can show it again. It is written to the file that
--token-out names, readable by its owner only, or else printed, once.`,
		Example: `  rekey identity add ci --scope read,apply --token-out ci.token
  rekey identity add orders-oncall --scope read,rotate,operate,emergency --team orders --token-out oncall.token`,
		Args: cobra.ExactArgs(1),
	}
	scopes := c.Flags().StringSlice("scope", nil, "what it may do: read, rotate, operate, emergency, apply, admin, metrics")
	teams := c.Flags().StringSlice("team", nil, "limit it to these teams' credentials")
	out := c.Flags().String("token-out", "", "write the token to this new `file`")
	_ = c.RegisterFlagCompletionFunc("scope", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		var names []string
		for _, s := range api.Scopes() {
			names = append(names, string(s))
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	})
	c.RunE = func(cmd *cobra.Command, args []string) error {
		client, err := a.client()
		if err != nil {
			return err
		}
		token, hash := api.NewToken()
		n := api.NewIdentity{Name: args[0], Teams: *teams, TokenSHA256: hash, Scopes: []api.Scope{}}
		for _, s := range *scopes {
			n.Scopes = append(n.Scopes, api.Scope(strings.TrimSpace(s)))
		}
		if *out != "" { // before the identity exists: a token that nobody has would be one more thing to clean up
			if err := writeToken(*out, token); err != nil {
				return err
			}
		}
		v, err := client.AddIdentity(cmd.Context(), n)
		if err != nil {
			if *out != "" && !errors.Is(err, api.ErrUnreachable) {
				_ = os.Remove(*out)
			}
			return err
		}
		shown := struct {
			api.IdentityView
			Token     string `json:"token,omitempty"`
			TokenFile string `json:"token_file,omitempty"`
		}{v, token, *out}
		if *out != "" {
			shown.Token = ""
		}
		return a.print(shown, func(w io.Writer) error {
			if *out != "" {
				_, err := fmt.Fprintf(w, "added %s; its token is in %s\n", v.Name, *out)
				return err
			}
			_, err := fmt.Fprintf(w, "added %s; its token, shown this once:\n%s\n", v.Name, token)
			return err
		})
	}
	return c
}

func writeToken(path, token string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("token file: %w", err)
	}
	_, err = f.WriteString(token + "\n")
	return errors.Join(err, f.Sync(), f.Close())
}

func newIdentityListCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Short:   "List identities",
		Long:    "List identities with what they may do. Tokens are kept nowhere.",
		Example: "  rekey identity list\n  rekey identity list --output json",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := a.client()
			if err != nil {
				return err
			}
			list, err := client.Identities(cmd.Context())
			if err != nil {
				return err
			}
			return a.print(list, func(w io.Writer) error {
				var rows [][]string
				for _, i := range list {
					var scopes []string
					for _, s := range i.Scopes {
						scopes = append(scopes, string(s))
					}
					may := strings.Join(scopes, ",")
					if len(scopes) == len(api.Scopes()) {
						may = "all"
					}
					rows = append(rows, []string{i.Name, i.CreatedAt.Local().Format("2006-01-02"), dash(i.CreatedBy), dash(strings.Join(i.Teams, ",")), may})
				}
				return table(w, []string{"NAME", "SINCE", "BY", "TEAMS", "SCOPES"}, rows)
			})
		},
	}
}

func newIdentityRemoveCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "remove NAME",
		Short: "Remove an identity; its token stops working at once",
		Long:  "Remove an identity; its token stops working at once. The last one with the scope admin stays.",
		Example: `  rekey identity remove ci
  # after making an admin of your own:
  rekey identity remove admin`,
		Args: cobra.ExactArgs(1),
		ValidArgsFunction: func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			client, err := a.client()
			if err != nil || len(args) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			list, _ := client.Identities(cmd.Context())
			var names []string
			for _, i := range list {
				names = append(names, i.Name)
			}
			return names, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := a.client()
			if err != nil {
				return err
			}
			if err := client.RemoveIdentity(cmd.Context(), args[0]); err != nil {
				return err
			}
			return a.print(map[string]string{"removed": args[0]}, func(w io.Writer) error {
				_, err := fmt.Fprintf(w, "removed %s\n", args[0])
				return err
			})
		},
	}
}
