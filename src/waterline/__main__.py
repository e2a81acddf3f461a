from waterline.cli import main

main()
